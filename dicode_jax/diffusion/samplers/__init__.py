"""Samplers: steppers behind one protocol, and the scan loop that drives any of them."""
