"""DDIM (Song et al., arXiv 2010.02502, equation 12) for eps-, x0- and v-prediction.

Deviations from the original's sampler: 1 - a_prev - sigma^2 is clamped at 0 (it rounds to -6e-8 at
the start of some trailing grids with eta 1, and the original's sample is then NaN); x0-prediction
is honoured (the original reads it as noise); noise prediction at alphas_cumprod = 0, where it says
nothing about the clean sample, is refused. Coefficients are rounded to float32 in the order the
original rounds them.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.schedules import NoiseSchedule, expand
from dicode_jax.typing import Array


class DDIMTables(NamedTuple):
    """Quantities of each step, numpy ``[steps, ...]`` in the order of the time grid.

    ``alphas`` and ``sqrt_one_minus_alphas`` have the dtype of the rounded alphas_cumprod,
    ``alphas_prev`` and ``sigmas`` are float64. ``scale`` and ``scale_prev`` are the dynamic-rescale
    factors (ones when it is off), float32.
    """

    alphas: np.ndarray
    alphas_prev: np.ndarray
    sigmas: np.ndarray
    sqrt_one_minus_alphas: np.ndarray
    scale: np.ndarray
    scale_prev: np.ndarray


class DDIMCoefficients(NamedTuple):
    """Factors of one update, float32 ``[steps, ...]``.

    ``signal``, ``spread``: sqrt(a) and sqrt(1 - a) as the prediction is inverted with them;
    ``x0``, ``eps``, ``noise``: factors of the three terms of the next state; ``x0_scale``: the
    dynamic rescale of the clean estimate.
    """

    signal: Array
    spread: Array
    x0: Array
    eps: Array
    noise: Array
    x0_scale: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM:
    """The DDIM update rule.

    Attributes:
        schedule: the training schedule; decides the parameterization and the dynamic rescale.
        eta: 0 is deterministic, 1 has the variance of ancestral sampling.
        temperature: factor of the injected noise.
        table_dtype: round alphas_cumprod to this dtype before building the tables ("float16" is
            what the Divot fork does); "float32" for everything else. The inversion of a velocity
            always uses the float32 tables.
    """

    schedule: NoiseSchedule
    eta: float = 1.0
    temperature: float = 1.0
    table_dtype: str = "float32"

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in 0..1, got {self.eta}")
        if self.table_dtype not in ("float32", "float16"):
            raise ValueError(f"table_dtype must be float32 or float16, got {self.table_dtype!r}")

    @property
    def is_stochastic(self) -> bool:
        """Whether noise is injected: eta and temperature both non-zero."""
        return self.eta > 0 and self.temperature > 0

    def tables(self, time_grid: np.ndarray) -> DDIMTables:
        """The per-step tables for a grid.

        Args:
            time_grid: int ``[steps + 1, ...]``; entries in 0..num_timesteps-1, or -1 for the clean
                sample as the target of a step. May not ascend.

        Raises:
            ValueError: an entry outside the schedule, a visited -1, or an ascending grid.
        """
        grid = np.asarray(time_grid)
        start, end = grid[:-1], grid[1:]
        last = self.schedule.num_timesteps - 1
        if start.min() < 0 or grid.max() > last or end.min() < -1:
            raise ValueError(
                f"the time grid spans {grid.min()}..{grid.max()}, but steps must start in 0..{last}"
            )
        if (end > start).any():
            raise ValueError("the time grid must not ascend: sampling goes from noise to data")
        acp = self.schedule.table("alphas_cumprod").astype(self.table_dtype)
        one = acp.dtype.type(1)
        alphas = acp[start]
        clean = end < 0
        alphas_prev = np.where(clean, 1.0, acp[end].astype(np.float64))
        # The original multiplies by a reciprocal that is rounded to the type of the table.
        reciprocal = one / np.maximum(one - alphas, np.finfo(acp.dtype).tiny)
        variance = (
            (1 - alphas_prev)
            * reciprocal
            * np.maximum(1 - alphas / np.maximum(alphas_prev, 1e-30), 0)
        )
        scale = self.schedule.scale_array
        # The original divides by the factor of the step itself at the last step: ratio 1.
        previous = np.where(
            np.arange(len(end)).reshape(-1, *[1] * (end.ndim - 1)) < len(end) - 1,
            scale[np.maximum(end, 0)],
            scale[start],
        )
        return DDIMTables(
            alphas=alphas,
            alphas_prev=alphas_prev,
            sigmas=self.eta * np.sqrt(variance),
            sqrt_one_minus_alphas=np.sqrt(one - alphas),
            scale=scale[start],
            scale_prev=previous,
        )

    def coefficients(self, time_grid: np.ndarray) -> DDIMCoefficients:
        """Float32 factors for every step of a grid; see `tables` for shapes and errors.

        Raises:
            ValueError: also when a visited step has alphas_cumprod 0 and the network predicts
                noise.
        """
        tables = self.tables(time_grid)
        start = np.asarray(time_grid)[:-1]
        if self.schedule.parameterization == "eps" and (tables.alphas <= 0).any():
            raise ValueError(
                "noise prediction cannot be inverted at a timestep whose alphas_cumprod is 0 "
                f"(t = {start[tables.alphas <= 0].max()}); use v-prediction or 'uniform' spacing"
            )
        alphas_prev = tables.alphas_prev.astype(np.float32)
        sigmas = tables.sigmas.astype(np.float32)
        direction = np.float32(1) - alphas_prev - sigmas**2
        if self.schedule.parameterization == "v":
            signal = self.schedule.table("sqrt_alphas_cumprod")[start]
            spread = self.schedule.table("sqrt_one_minus_alphas_cumprod")[start]
        else:
            signal = np.sqrt(tables.alphas.astype(np.float32))
            spread = tables.sqrt_one_minus_alphas.astype(np.float32)
        return DDIMCoefficients(
            signal=signal,
            spread=spread,
            x0=np.sqrt(alphas_prev),
            eps=np.sqrt(np.maximum(direction, np.float32(0))),
            noise=sigmas * np.float32(self.temperature),
            x0_scale=(tables.scale_prev / tables.scale).astype(np.float32),
        )

    def step(
        self, x: Array, prediction: Array, coefficients: DDIMCoefficients, noise: Array | None
    ) -> tuple[Array, Array]:
        """One update.

        Args:
            x: state ``[b, ...]``.
            prediction: guided network output, the shape of ``x``.
            coefficients: one step's factors, each a scalar, ``[b]`` or ``[b, f]``.
            noise: standard normal of the shape of ``x``; may be None when not stochastic.

        Returns:
            The next state, and the clean-sample estimate after the dynamic rescale, float32.
        """
        c = DDIMCoefficients(*(expand(jnp.asarray(value), x.ndim) for value in coefficients))
        x, prediction = x.astype(jnp.float32), prediction.astype(jnp.float32)
        if self.schedule.parameterization == "v":
            eps = c.signal * prediction + c.spread * x
            x0 = c.signal * x - c.spread * prediction
        elif self.schedule.parameterization == "eps":
            eps = prediction
            x0 = (x - c.spread * eps) / c.signal
        else:
            x0 = prediction
            eps = (x - c.signal * x0) / jnp.maximum(c.spread, 1e-12)
        if self.schedule.base_scale is not None:
            x0 = x0 * c.x0_scale
        new_x = c.x0 * x0 + c.eps * eps
        if noise is not None and self.is_stochastic:
            new_x = new_x + c.noise * noise
        return new_x, x0
