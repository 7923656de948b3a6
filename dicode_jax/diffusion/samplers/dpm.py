"""DPM-Solver++(2M), deterministic and SDE (Lu et al., arXiv 2211.01095, algorithm 2, appendix A).

With x = alpha x0 + sigma eps, lambda = log(alpha / sigma) and h = lambda' - lambda, one step is

    x' = sigma'/sigma e^(-eta h) x + alpha' (1 - e^(-h - eta h)) D + sigma' sqrt(1 - e^(-2 eta h)) z

where D extrapolates the last two clean estimates: D = x0 + h / (2 h_last) (x0 - x0_last). Without
the extrapolation it is DDIM of eta 0 and 1. Coefficients are made in float64. At alphas_cumprod = 0
lambda is -inf, and they are the limits: the first step puts its estimate in place of the sample
(which it keeps as noise where eta is 0), and it and the next are of order 1. The dynamic rescale s
is part of alpha, sqrt(alphas_cumprod) s; of that the noise of DDIM takes no account.
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


class DPMCoefficients(NamedTuple):
    """Factors of one update, ``[steps, ...]``; float64, but float32 where eta is traced.

    ``signal``, ``spread``: sqrt(a) and sqrt(1 - a), with which the prediction is inverted;
    ``x0_scale``: takes the dynamic rescale off the clean estimate; ``history``: weight of its
    change since the last step; ``x``, ``x0``, ``noise``: factors of the terms of the next sample.
    """

    signal: Array
    spread: Array
    x0_scale: Array
    history: Array
    x: Array
    x0: Array
    noise: Array


def levels(schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each timestep sqrt(a), sqrt(1 - a) and the dynamic rescale, float64; -1 is the clean."""
    a = np.append(schedule.alphas_cumprod64, 1.0)
    scales = schedule.scale_array[: schedule.num_timesteps].astype(np.float64)
    return np.sqrt(a), np.sqrt(1.0 - a), np.append(scales, 1.0)


def log_snr_steps(schedule: NoiseSchedule, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """By how much lambda grows in each step: from 0, of one of no length, to infinity.

    Args:
        schedule: the training schedule.
        start, end: timesteps, int ``[steps, ...]``.
    """
    signal, spread, scales = levels(schedule)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_snr = np.log(signal * scales) - np.log(spread)  # from -inf to inf
        return np.where(start == end, 0.0, log_snr[end] - log_snr[start])


def update_factors(
    h: np.ndarray,
    alpha_end: np.ndarray,
    sigma_start: np.ndarray,
    sigma_end: np.ndarray,
    eta: float | Array,
) -> dict[str, Any]:
    """``history``, ``x``, ``x0`` and ``noise`` of `DPMCoefficients`, each ``[steps, ...]``.

    Args:
        h: by how much lambda grows in each step, from 0 to infinity.
        alpha_end: factor of the clean sample where a step ends.
        sigma_start, sigma_end: factors of the noise where it starts and ends.
        eta: see `DPMSolver`.
    """
    xp = namespace(eta)
    with np.errstate(divide="ignore", invalid="ignore"):
        last = np.concatenate([np.zeros_like(h[:1]), h[:-1]])
        history = np.where((last > 0) & np.isfinite(h), h / (2.0 * last), 0.0)
        eta_h = xp.where(eta > 0, eta * h, 0.0)  # 0 times infinity is 0 here
    return {
        "history": history,
        "x": sigma_end / sigma_start * xp.exp(-eta_h),
        "x0": -alpha_end * xp.expm1(-h - eta_h),
        "noise": sigma_end * xp.sqrt(-xp.expm1(-2.0 * eta_h)),
    }


def update(
    parameterization: str,
    state: State,
    prediction: Array,
    coefficients: DPMCoefficients,
    noise: Array | None,
) -> State:
    """One update, see `DPMSolver.step`; noise is added where there is some."""
    x, prediction = state.x.astype(jnp.float32), prediction.astype(jnp.float32)
    c = DPMCoefficients(*(expand(value, x.ndim) for value in coefficients))
    x0, _ = x0_and_eps(parameterization, x, prediction, c.signal, c.spread)
    x0 = x0 * c.x0_scale
    new_x = c.x * x + c.x0 * (x0 + c.history * (x0 - state.x0))
    return State(new_x if noise is None else new_x + c.noise * noise, x0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolver:
    """The multistep update rule of order 2.

    Attributes:
        schedule: the training schedule; decides the parameterization and the dynamic rescale.
        eta: 0 solves the probability-flow ODE, 1 the reverse SDE of the paper; in between, that SDE
            with its noise and the pull against it scaled by sqrt(eta) and eta, whose samples have
            the same distribution. A number, or traced.
        lower_order_final: make the last step of order 1, for few steps.
    """

    schedule: NoiseSchedule
    eta: float | Array = 0.0
    lower_order_final: bool = False

    def __post_init__(self):
        check_eta(self.eta)

    @property
    def is_stochastic(self) -> bool:
        """Whether noise is injected: eta is not 0, or traced."""
        return is_nonzero(self.eta)

    def coefficients(self, time_grid: np.ndarray) -> tuple[np.ndarray, DPMCoefficients]:
        """Visited timesteps, int ``[steps, ...]``, and the factors of every step.

        A step to the clean sample (-1), and one that follows a step of no length, is of order 1.

        Raises:
            ValueError: the grid leaves the schedule or ascends, or a visited step has
                alphas_cumprod 0 and the network predicts noise.
        """
        start, end = split_grid(time_grid, self.schedule)
        signal, spread, scales = levels(self.schedule)
        check_inversion(self.schedule, start, signal[start])
        h = log_snr_steps(self.schedule, start, end)
        factors = update_factors(h, (signal * scales)[end], spread[start], spread[end], self.eta)
        if self.lower_order_final:
            factors["history"][-1] = 0.0
        given = {"signal": signal[start], "spread": spread[start], "x0_scale": 1.0 / scales[start]}
        return start, DPMCoefficients(**given, **factors)

    def init(self, x: Array) -> State:
        """The starting sample; the first step has no use for the estimate, of weight 0."""
        return initial_state(x)

    def step(
        self, state: State, prediction: Array, coefficients: DPMCoefficients, noise: Array | None
    ) -> State:
        """One update.

        Args:
            state: sample ``[b, ...]`` and the clean estimate of the step before.
            prediction: guided network output, the shape of the sample.
            coefficients: one step's factors, each a scalar or ``[b, f]``.
            noise: standard normal of the shape of the sample; may be None when not stochastic.

        Returns:
            The next sample, and the clean estimate without dynamic rescale, float32.
        """
        noise = noise if self.is_stochastic else None
        return update(self.schedule.parameterization, state, prediction, coefficients, noise)
