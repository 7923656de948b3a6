"""Samplers: update rules behind one protocol, and the scan loop that drives any of them."""

SAMPLERS = ("ddim", "dpm++", "unipc")
"""Names by which a user picks one; `dicode_jax.diffusion.guided.make_sampler` makes it."""
