"""What programs of pipelines with a `UNet3D` and ready contexts share; see `painting.Programs`."""

from typing import Any

from dicode_jax.diffusion.guided import SamplingConfig, by_sample, starting_noise
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.models.latent_video import latent_steps
from dicode_jax.models.unet3d import UNet3D
from dicode_jax.nn.rngs import sample_keys
from dicode_jax.pipelines import painting
from dicode_jax.typing import Array, PyTree


def begin(
    unet: UNet3D,
    schedule: NoiseSchedule,
    conditions: list[Any],
    seeds: Array,
    latent_shape: tuple[int, ...],
    sampling: SamplingConfig,
) -> PyTree:
    """What all steps are given, and what goes into the first one."""
    keys = sample_keys(seeds)
    steps = latent_steps(unet, schedule, conditions, keys, latent_shape, sampling)
    x = starting_noise(keys, (sampling.num_frames, *latent_shape))
    return {"seed": seeds, "conditions": conditions}, by_sample(steps.begin(x))


def advance(
    unet: UNet3D,
    schedule: NoiseSchedule,
    rows: PyTree,
    sampling: SamplingConfig,
    start: Array,
    stop: Array,
) -> PyTree:
    """Takes some steps."""
    given, carry = rows["given"], by_sample(rows["carry"])
    keys, (_, _, *shape) = sample_keys(given["seed"]), carry.state.x.shape
    steps = latent_steps(unet, schedule, given["conditions"], keys, tuple(shape), sampling)
    return by_sample(steps.advance(carry, start, stop)), painting.ticks(rows, stop)
