"""DDIM (Song et al., arXiv 2010.02502, equation 12) for eps-, x0- and v-prediction.

Deviations from the original's sampler: 1 - a_prev - sigma^2 is clamped at 0 (it rounds to -6e-8 at
the start of some trailing grids with eta 1, and the original's sample is then NaN); x0-prediction
is honoured (the original reads it as noise); noise prediction at alphas_cumprod = 0, where it says
nothing about the clean sample, is refused. Coefficients are rounded to float32 in the order the
original rounds them.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.parameterization import x0_and_eps
from dicode_jax.diffusion.samplers.base import State, initial_state
from dicode_jax.diffusion.samplers.checks import (
    check_eta,
    check_inversion,
    is_nonzero,
    namespace,
    split_grid,
)
from dicode_jax.diffusion.schedules import NoiseSchedule, expand
from dicode_jax.typing import Array


class DDIMTables(NamedTuple):
    """Quantities of each step, ``[steps, ...]`` in the order of the time grid.

    ``alphas`` and ``sqrt_one_minus_alphas`` have the dtype of the rounded alphas_cumprod,
    ``alphas_prev`` and ``sigmas`` are float64 (of a traced eta, ``sigmas`` is float32). ``scale``
    and ``scale_prev`` are the dynamic-rescale factors (ones when it is off), float32.
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
        eta: 0 is deterministic, 1 has the variance of ancestral sampling; a number, or traced.
        table_dtype: round alphas_cumprod to this dtype before building the tables ("float16" is
            what the Divot fork does); "float32" for everything else. The inversion of a velocity
            always uses the float32 tables.
    """

    schedule: NoiseSchedule
    eta: float | Array = 1.0
    table_dtype: str = "float32"

    def __post_init__(self):
        check_eta(self.eta)
        if self.table_dtype not in ("float32", "float16"):
            raise ValueError(f"table_dtype must be float32 or float16, got {self.table_dtype!r}")

    @property
    def is_stochastic(self) -> bool:
        """Whether noise is injected: eta is not 0, or traced."""
        return is_nonzero(self.eta)

    def tables(self, time_grid: np.ndarray) -> DDIMTables:
        """The per-step tables for a grid.

        Args:
            time_grid: int ``[steps + 1, ...]``; entries in 0..num_timesteps-1, or -1 for the clean
                sample as the target of a step. May not ascend.

        Raises:
            ValueError: an entry outside the schedule, a visited -1, or an ascending grid.
        """
        start, end = split_grid(time_grid, self.schedule)
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

    def coefficients(self, time_grid: np.ndarray) -> tuple[np.ndarray, DDIMCoefficients]:
        """Visited timesteps, int ``[steps, ...]``, and the factors of every step.

        Raises:
            ValueError: see `tables`; also when a visited step has alphas_cumprod 0 and the network
                predicts noise.
        """
        tables = self.tables(time_grid)
        start = np.asarray(time_grid)[:-1]
        check_inversion(self.schedule, start, tables.alphas)
        alphas_prev = tables.alphas_prev.astype(np.float32)
        sigmas = tables.sigmas.astype(np.float32)
        xp = namespace(self.eta)
        direction = np.float32(1) - alphas_prev - sigmas**2
        if self.schedule.parameterization == "v":
            signal = self.schedule.table("sqrt_alphas_cumprod")[start]
            spread = self.schedule.table("sqrt_one_minus_alphas_cumprod")[start]
        else:
            signal = np.sqrt(tables.alphas.astype(np.float32))
            spread = tables.sqrt_one_minus_alphas.astype(np.float32)
        values: dict[str, Any] = {
            "signal": signal,
            "spread": spread,
            "x0": np.sqrt(alphas_prev),
            "eps": xp.sqrt(xp.maximum(direction, np.float32(0))),
            "noise": sigmas,
            "x0_scale": (tables.scale_prev / tables.scale).astype(np.float32),
        }
        return start, DDIMCoefficients(**values)

    def init(self, x: Array) -> State:
        """The starting sample, and no estimate yet."""
        return initial_state(x)

    def step(
        self, state: State, prediction: Array, coefficients: DDIMCoefficients, noise: Array | None
    ) -> State:
        """One update.

        Args:
            state: sample ``[b, ...]``; its estimate is not read.
            prediction: guided network output, the shape of the sample.
            coefficients: one step's factors, each a scalar or ``[b, f]``.
            noise: standard normal of the shape of the sample; may be None when not stochastic.

        Returns:
            The next sample, and the clean-sample estimate after the dynamic rescale, float32.
        """
        x, prediction = state.x.astype(jnp.float32), prediction.astype(jnp.float32)
        c = DDIMCoefficients(*(expand(value, x.ndim) for value in coefficients))
        x0, eps = x0_and_eps(self.schedule.parameterization, x, prediction, c.signal, c.spread)
        if self.schedule.base_scale is not None:
            x0 = x0 * c.x0_scale
        new_x = c.x0 * x0 + c.eps * eps
        if noise is not None and self.is_stochastic:
            new_x = new_x + c.noise * noise
        return State(new_x, x0)
