"""What the network predicts (noise, clean sample or velocity), and how to pass between them.

Velocity is v = sqrt(a) eps - sqrt(1 - a) x0 with a = alphas_cumprod[t] (Salimans and Ho, arXiv
2202.00512). The functions take ``timesteps`` as ``[b]`` or, for a different noise level per frame,
``[b, f]``, and samples as ``[b, ...]`` or ``[b, f, ...]``; arithmetic is in float32.
"""

import jax.numpy as jnp

from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.typing import Array, Float, Int, typechecked

Sample = Float[Array, " b *rest"]
Timesteps = Int[Array, " b"] | Int[Array, "b f"]


@typechecked
def add_noise(schedule: NoiseSchedule, x0: Sample, noise: Sample, timesteps: Timesteps) -> Sample:
    """Sample of q(x_t | x0): ``sqrt(a) x0 + sqrt(1 - a) noise``, the shape of ``x0``."""
    signal, spread = _signal_and_spread(schedule, timesteps, x0.ndim)
    return signal * x0 + spread * noise


@typechecked
def velocity(schedule: NoiseSchedule, x0: Sample, noise: Sample, timesteps: Timesteps) -> Sample:
    """The v target: ``sqrt(a) noise - sqrt(1 - a) x0``, the shape of ``x0``."""
    signal, spread = _signal_and_spread(schedule, timesteps, x0.ndim)
    return signal * noise - spread * x0


@typechecked
def x0_and_eps(
    parameterization: str, x_t: Sample, prediction: Sample, signal: Array, spread: Array
) -> tuple[Sample, Sample]:
    """Clean sample and noise from a prediction of any kind, at levels that are given.

    Args:
        parameterization: one of `dicode_jax.diffusion.schedules.PARAMETERIZATIONS`.
        x_t: noisy sample, float32.
        prediction: network output, float32.
        signal, spread: factors of clean sample and noise in ``x_t``, which they broadcast against.
    """
    if parameterization == "v":
        return signal * x_t - spread * prediction, signal * prediction + spread * x_t
    if parameterization == "eps":
        return (x_t - spread * prediction) / signal, prediction
    return prediction, (x_t - signal * prediction) / jnp.maximum(spread, 1e-12)


@typechecked
def training_target(
    schedule: NoiseSchedule, x0: Sample, noise: Sample, timesteps: Timesteps
) -> Sample:
    """What the network should output at ``timesteps``: noise, ``x0`` or velocity."""
    if schedule.parameterization == "eps":
        return noise
    if schedule.parameterization == "x0":
        return x0
    return velocity(schedule, x0, noise, timesteps)


def _signal_and_spread(schedule: NoiseSchedule, timesteps: Array, ndim: int):
    return (
        schedule.gather("sqrt_alphas_cumprod", timesteps, ndim),
        schedule.gather("sqrt_one_minus_alphas_cumprod", timesteps, ndim),
    )
