"""What samplers share: checks of a time grid and of eta, and how a traced eta is handled."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.typing import Array


def split_grid(time_grid: np.ndarray, schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
    """Where each step starts and where it ends, int ``[steps, ...]``; an end of -1 is clean.

    Raises:
        ValueError: an entry outside the schedule, a visited -1, or an ascending grid.
    """
    grid = np.asarray(time_grid)
    start, end = grid[:-1], grid[1:]
    last = schedule.num_timesteps - 1
    if start.min() < 0 or grid.max() > last or end.min() < -1:
        raise ValueError(
            f"the time grid spans {grid.min()}..{grid.max()}, but steps must start in 0..{last}"
        )
    if (end > start).any():
        raise ValueError("the time grid must not ascend: sampling goes from noise to data")
    return start, end


def check_inversion(schedule: NoiseSchedule, start: np.ndarray, alphas: np.ndarray) -> None:
    """Refuses noise prediction at a visited step that holds nothing of the clean sample.

    Args:
        start: visited timesteps.
        alphas: alphas_cumprod there, of the same shape.

    Raises:
        ValueError: alphas_cumprod is 0 at one of them, and the network predicts noise.
    """
    if schedule.parameterization == "eps" and (alphas <= 0).any():
        raise ValueError(
            "noise prediction cannot be inverted at a timestep whose alphas_cumprod is 0 "
            f"(t = {start[alphas <= 0].max()}); use v-prediction or 'uniform' spacing"
        )


def is_nonzero(eta: float | Array) -> bool:
    """Whether eta may be anything but 0; of a traced one that is not known."""
    return isinstance(eta, jax.Array) or eta != 0


def namespace(eta: float | Array) -> ModuleType:
    """numpy, so that coefficients are made in its types on the host; jax's where eta is traced."""
    return jnp if isinstance(eta, jax.Array) else np


def check_eta(eta: float | Array) -> None:
    """Raises ValueError for an eta outside of 0..1; a traced one is not looked at."""
    if not isinstance(eta, jax.Array) and not 0 <= eta <= 1:
        raise ValueError(f"eta must be in 0..1, got {eta}")
