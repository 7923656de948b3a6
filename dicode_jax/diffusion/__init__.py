"""Gaussian diffusion: schedules, parameterizations, time grids, guidance, losses and samplers."""
