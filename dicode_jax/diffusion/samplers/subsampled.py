"""SDE-DPM-Solver++(2M) as CogVideoX and LanDiff (arXiv 2503.04606) run it.

The update is `DPMSolver`'s of eta 1. Two things differ: with zero terminal SNR the rescale is done
over the visited timesteps, so that noise levels are not those of training, and a prediction is
inverted at the level of training that is nearest.
"""

import dataclasses
from typing import Any

import numpy as np

from dicode_jax.diffusion.samplers.base import State, initial_state
from dicode_jax.diffusion.samplers.checks import check_inversion, split_grid
from dicode_jax.diffusion.samplers.dpm import DPMCoefficients, update, update_factors
from dicode_jax.diffusion.schedules import NoiseSchedule, end_at_zero
from dicode_jax.typing import Array


def subsampled_time_grid(num_steps: int, num_timesteps: int = 1000) -> np.ndarray:
    """Evenly spaced timesteps from the last of training down, then -1 for clean.

    Returns:
        int32 ``[num_steps + 1]``.

    Raises:
        ValueError: fewer than 2 steps, or more than there are timesteps.
    """
    if not 2 <= num_steps <= num_timesteps:
        raise ValueError(
            f"the number of sampling steps must be in 2..{num_timesteps}, got {num_steps}"
        )
    visited = np.linspace(num_timesteps - 1, 0, num_steps, endpoint=False)
    return np.append(visited.astype(np.int32), np.int32(-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubsampledDPM:
    """The update rule.

    Attributes:
        schedule: the training schedule; without dynamic rescale.
    """

    schedule: NoiseSchedule

    def __post_init__(self):
        if self.schedule.base_scale is not None:
            raise ValueError("this sampler takes no schedule with a dynamic rescale")

    @property
    def is_stochastic(self) -> bool:
        """It is."""
        return True

    def signals(self, time_grid: np.ndarray) -> np.ndarray:
        """Factor of the clean sample at each entry of a grid, float64 ``[steps + 1]``.

        Raises:
            ValueError: see `split_grid`; or not a grid of one axis that ends clean and descends.
        """
        start, end = split_grid(time_grid, self.schedule)
        if start.ndim != 1 or len(start) < 2 or end[-1] != -1 or (np.diff(start) >= 0).any():
            raise ValueError(
                "this sampler takes two or more descending timesteps, the same for all frames, and "
                "ends at -1"
            )
        root = np.sqrt(np.cumprod(1.0 - self.schedule.shifted_betas64))[start]
        if self.schedule.zero_terminal_snr:
            root = end_at_zero(root[::-1])[::-1]
        return np.append(root, 1.0)

    def nearest(self, signals: np.ndarray) -> np.ndarray:
        """Timesteps of training whose factors are nearest, int ``[steps]``."""
        grid = np.sqrt(self.schedule.alphas_cumprod64)
        return np.abs(signals[:, None] - grid[None]).argmin(axis=1)

    def coefficients(self, time_grid: np.ndarray) -> tuple[np.ndarray, DPMCoefficients]:
        """Visited timesteps, int ``[steps]``, and the factors of every step.

        Raises:
            ValueError: see `signals`; or a visited step holds nothing of the clean sample, and the
                network predicts noise.
        """
        signal = self.signals(time_grid)
        start = np.asarray(time_grid)[:-1]
        spread = np.sqrt(1.0 - signal**2)
        with np.errstate(divide="ignore"):
            log_snr = np.log(signal) - np.log(spread)  # from -inf to inf
        factors = update_factors(np.diff(log_snr), signal[1:], spread[:-1], spread[1:], eta=1.0)
        known = self.schedule.alphas_cumprod64[self.nearest(signal[:-1])]
        check_inversion(self.schedule, start, known)
        given: dict[str, Any] = {
            "signal": np.sqrt(known),
            "spread": np.sqrt(1.0 - known),
            "x0_scale": np.ones(len(start)),
        }
        return start, DPMCoefficients(**given, **factors)

    def init(self, x: Array) -> State:
        """The starting sample, and no estimate yet."""
        return initial_state(x)

    def step(
        self, state: State, prediction: Array, coefficients: DPMCoefficients, noise: Array | None
    ) -> State:
        """One update, see `DPMSolver.step`; the last one gives its estimate."""
        return update(self.schedule.parameterization, state, prediction, coefficients, noise)
