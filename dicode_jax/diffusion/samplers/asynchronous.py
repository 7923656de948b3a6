"""DDIM in which every frame stands at its own step (AR-Diffusion, arXiv 2503.07418).

The grid counts steps, 0 .. n, instead of timesteps (see `diffusion.frame_schedule`): a frame at
step 0 is noise, and the network is told the last training timestep; in the row that brings it to
step k it is told the k-th of the visited timesteps, and one that is done the last of them.

Frames that take no step stay as they are, bit for bit. In the original they are sent through the
update with their own noise as the prediction, by which finished frames grow by 2e-5 in each row
(more with other parameterizations than x0); `drift=True` does the same.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.parameterization import x0_and_eps
from dicode_jax.diffusion.samplers.base import State, initial_state
from dicode_jax.diffusion.samplers.checks import check_inversion
from dicode_jax.diffusion.schedules import NoiseSchedule, expand
from dicode_jax.typing import Array


class AsynchronousCoefficients(NamedTuple):
    """Factors of one row, ``[rows, b, f]``.

    ``signal``, ``spread``: sqrt(a) and sqrt(1 - a) where the frame stands; ``x0``, ``eps``: the
    same where it goes; ``moves``: whether it goes at all.
    """

    signal: Array
    spread: Array
    x0: Array
    eps: Array
    moves: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsynchronousDDIM:
    """The update rule, deterministic.

    Attributes:
        schedule: the training schedule; decides the parameterization.
        timesteps: visited, ascending; see `diffusion.time_grid.ddim_timesteps`.
        drift: frames that take no step are changed as in the original.
    """

    schedule: NoiseSchedule
    timesteps: tuple[int, ...]
    drift: bool = False

    is_stochastic = False

    def coefficients(self, time_grid: np.ndarray) -> tuple[np.ndarray, AsynchronousCoefficients]:
        """What the network is told, int ``[rows, ...]``, and the factors of every row.

        Args:
            time_grid: steps that each frame has taken, ``[rows + 1, ...]``.

        Raises:
            ValueError: a step outside of 0 .. n, or noise prediction where there is only noise.
        """
        steps, n = np.asarray(time_grid), len(self.timesteps)
        if steps.min() < 0 or steps.max() > n:
            raise ValueError(f"steps must be in 0..{n}, got {steps.min()}..{steps.max()}")
        last = self.schedule.num_timesteps - 1
        told = np.array([last, *self.timesteps[::-1]])
        ends = np.array([last, *self.timesteps[-2::-1], 0])
        here, moves = told[steps[1:]], steps[1:] != steps[:-1]
        acp64 = self.schedule.alphas_cumprod64
        check_inversion(self.schedule, here, acp64[here])
        after = self.schedule.table("alphas_cumprod")[ends[steps[1:]]]  # rounded, then 1 - a
        values: dict[str, Any] = {
            "signal": np.sqrt(acp64[here]).astype(np.float32),
            "spread": np.sqrt(1 - acp64[here]).astype(np.float32),
            "x0": np.sqrt(after),
            "eps": np.sqrt(np.float32(1) - after),
            "moves": moves,
        }
        return here, AsynchronousCoefficients(**values)

    def told(self, interval: tuple[float, float]) -> tuple[int, int]:
        """The least and the greatest timestep that a part of a frame's steps is told.

        Args:
            interval: shares of the steps, from the noisiest, where the part begins and ends. Of an
                empty one the least is above the greatest.
        """
        start, end = (round(share * len(self.timesteps)) for share in interval)
        part = self.timesteps[::-1][start:end]
        return (part[-1], part[0]) if part else (1, 0)

    def init(self, x: Array) -> State:
        """The starting sample, and no estimate yet."""
        return initial_state(x)

    def step(
        self,
        state: State,
        prediction: Array,
        coefficients: AsynchronousCoefficients,
        noise: Array | None,
    ) -> State:
        """One row.

        Args:
            state: sample ``[b, f, ...]`` and its estimate, which frames that take no step keep.
            prediction: guided network output, the shape of the sample.
            coefficients: one row's factors, ``[b, f]``.
            noise: not used.
        """
        del noise
        x, prediction = state.x.astype(jnp.float32), prediction.astype(jnp.float32)
        c = AsynchronousCoefficients(*(expand(value, x.ndim) for value in coefficients))
        if self.drift:
            prediction = jnp.where(c.moves, prediction, x)
        x0, eps = x0_and_eps(self.schedule.parameterization, x, prediction, c.signal, c.spread)
        new_x = c.x0 * x0 + c.eps * eps
        if self.drift:
            return State(new_x, x0)
        return State(jnp.where(c.moves, new_x, x), jnp.where(c.moves, x0, state.x0))
