"""Noise schedules: betas, the zero-terminal-SNR rescale, and every table derived from them.

Tables are computed once in numpy float64 and stored as float32, as in the DDPM lineage (Ho et al.,
arXiv 2006.11239; Nichol and Dhariwal, arXiv 2102.09672; zero terminal SNR: Lin et al., arXiv
2305.08891, algorithm 1). The names of the buffers are the ones found in checkpoints.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from dicode_jax.typing import Array

PARAMETERIZATIONS = ("eps", "x0", "v")
BETA_SCHEDULES = ("linear", "sqrt_linear", "sqrt", "cosine")

PERSISTENT_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
"""Buffers a checkpoint carries. ``lvlb_weights`` and ``scale_arr`` are recomputed, never stored."""


def make_betas(
    beta_schedule: str, num_timesteps: int, *, linear_start: float, linear_end: float
) -> np.ndarray:
    """Betas of a schedule before any rescaling.

    Args:
        beta_schedule: "linear" is linear in sqrt(beta) and then squared, as in latent diffusion;
            "sqrt_linear" is linear in beta; "sqrt" is its square root; "cosine" is Nichol and
            Dhariwal's with offset 8e-3.
        num_timesteps: number of training steps.
        linear_start, linear_end: first and last beta of the linear families.

    Returns:
        float64 ``[num_timesteps]``.

    Raises:
        ValueError: unknown name.
    """
    if beta_schedule == "linear":
        return np.linspace(math.sqrt(linear_start), math.sqrt(linear_end), num_timesteps) ** 2
    if beta_schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, num_timesteps)
    if beta_schedule == "sqrt":
        return np.linspace(linear_start, linear_end, num_timesteps) ** 0.5
    if beta_schedule == "cosine":
        offset = 8e-3
        steps = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps + offset
        alphas_cumprod = np.cos(steps / (1 + offset) * np.pi / 2) ** 2
        alphas_cumprod = alphas_cumprod / alphas_cumprod[0]
        return np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)
    raise ValueError(f"unknown beta schedule {beta_schedule!r}; use one of {BETA_SCHEDULES}")


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alphas_cumprod) so that it ends at exactly 0 and keeps its first value.

    Args:
        betas: float64 ``[num_timesteps]``, each in (0, 1).

    Returns:
        float64 ``[num_timesteps]``; the last one is exactly 1.
    """
    return _betas_of(end_at_zero(np.sqrt(np.cumprod(1.0 - betas))) ** 2)


def end_at_zero(root: np.ndarray) -> np.ndarray:
    """Shifts and scales so that the last number becomes 0 and the first stays; float64."""
    first, last = root[0], root[-1]
    return (root - last) * (first / (first - last))


def shift_snr(betas: np.ndarray, factor: float) -> np.ndarray:
    """Betas of the same process with its signal-to-noise ratio divided by ``factor``, float64."""
    a = np.cumprod(1.0 - betas)
    return _betas_of(a / (factor + (1 - factor) * a))


def _betas_of(alphas_cumprod: np.ndarray) -> np.ndarray:
    alphas = np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1.0 - alphas


def make_scale_array(base_scale: float, turning_step: int, num_timesteps: int) -> np.ndarray:
    """Factors of the dynamic rescale (DynamiCrafter): 1 down to ``base_scale``, then constant.

    Args:
        base_scale: factor reached at ``turning_step``.
        turning_step: length of the ramp.
        num_timesteps: length of the constant part; the result is longer than any timestep needs.

    Returns:
        float32 ``[turning_step + num_timesteps]``.
    """
    ramp = np.linspace(1.0, base_scale, turning_step)
    return np.concatenate([ramp, np.full(num_timesteps, base_scale)]).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """A training noise schedule and its tables, all of shape ``[num_timesteps]``.

    The object is immutable, hashable and holds settings only; tables are computed on first use.

    Attributes:
        num_timesteps: number of training steps.
        beta_schedule: see `make_betas`.
        linear_start, linear_end: first and last beta before rescaling.
        zero_terminal_snr: apply `rescale_zero_terminal_snr`; alphas_cumprod then ends at exactly 0.
        parameterization: what the network predicts: "eps", "x0" or "v".
        base_scale: last factor of the dynamic rescale of latents; None for off.
        turning_step: timestep from which the dynamic rescale is constant.
        v_posterior: weight of beta in the posterior variance, 0 in all published models.
        snr_shift: divides the signal-to-noise ratio, before `zero_terminal_snr`; 1 for off.
    """

    num_timesteps: int = 1000
    beta_schedule: str = "linear"
    linear_start: float = 0.00085
    linear_end: float = 0.012
    zero_terminal_snr: bool = False
    parameterization: str = "eps"
    base_scale: float | None = None
    turning_step: int = 400
    v_posterior: float = 0.0
    snr_shift: float = 1.0

    def __post_init__(self):
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, got {self.num_timesteps}")
        if self.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(
                f"unknown beta schedule {self.beta_schedule!r}; use one of {BETA_SCHEDULES}"
            )
        if self.parameterization not in PARAMETERIZATIONS:
            raise ValueError(
                f"unknown parameterization {self.parameterization!r}; "
                f"use one of {PARAMETERIZATIONS}"
            )
        if not 0 < self.linear_start <= self.linear_end < 1:
            raise ValueError(
                "betas must satisfy 0 < linear_start <= linear_end < 1, got "
                f"{self.linear_start} and {self.linear_end}"
            )
        if not 0 < self.snr_shift < math.inf:
            raise ValueError(f"snr_shift must be positive, got {self.snr_shift}")
        if self.base_scale is not None and (self.base_scale <= 0 or self.turning_step < 1):
            raise ValueError(
                "the dynamic rescale needs base_scale > 0 and turning_step >= 1, got "
                f"{self.base_scale} and {self.turning_step}"
            )

    @functools.cached_property
    def shifted_betas64(self) -> np.ndarray:
        """Betas before `rescale_zero_terminal_snr`, float64."""
        betas = make_betas(
            self.beta_schedule,
            self.num_timesteps,
            linear_start=self.linear_start,
            linear_end=self.linear_end,
        )
        return betas if self.snr_shift == 1 else shift_snr(betas, self.snr_shift)

    @functools.cached_property
    def betas64(self) -> np.ndarray:
        """Betas before the cast, float64."""
        betas = self.shifted_betas64
        return rescale_zero_terminal_snr(betas) if self.zero_terminal_snr else betas

    @functools.cached_property
    def alphas_cumprod64(self) -> np.ndarray:
        """Cumulative products of 1 - beta before the cast, float64."""
        return np.cumprod(1.0 - self.betas64)

    @functools.cached_property
    def buffers(self) -> Mapping[str, np.ndarray]:
        """All float32 tables by the names they have in checkpoints, and ``lvlb_weights``.

        With ``zero_terminal_snr`` and "eps", the last entries of ``sqrt_recip_alphas_cumprod``,
        ``sqrt_recipm1_alphas_cumprod`` and ``lvlb_weights`` are infinite: noise prediction holds no
        information there. With "v" the two reciprocal tables are zero, unused placeholders.
        """
        betas, acp = self.betas64, self.alphas_cumprod64
        alphas = 1.0 - betas
        prev = np.concatenate([[1.0], acp[:-1]])
        with np.errstate(divide="ignore"):
            if self.parameterization == "v":
                recip = recipm1 = np.zeros_like(acp)
            else:
                recip, recipm1 = np.sqrt(1.0 / acp), np.sqrt(1.0 / acp - 1.0)
            variance = (1 - self.v_posterior) * betas * (1.0 - prev) / (1.0 - acp)
            variance = variance + self.v_posterior * betas
            tables = {
                "betas": betas,
                "alphas_cumprod": acp,
                "alphas_cumprod_prev": prev,
                "sqrt_alphas_cumprod": np.sqrt(acp),
                "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - acp),
                "log_one_minus_alphas_cumprod": np.log(1.0 - acp),
                "sqrt_recip_alphas_cumprod": recip,
                "sqrt_recipm1_alphas_cumprod": recipm1,
                "posterior_variance": variance,
                "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
                "posterior_mean_coef1": betas * np.sqrt(prev) / (1.0 - acp),
                "posterior_mean_coef2": (1.0 - prev) * np.sqrt(alphas) / (1.0 - acp),
            }
            tables = {name: table.astype(np.float32) for name, table in tables.items()}
            tables["lvlb_weights"] = self._lvlb_weights(tables, alphas.astype(np.float32))
        return tables

    def _lvlb_weights(self, tables: Mapping[str, np.ndarray], alphas: np.ndarray) -> np.ndarray:
        """Weights of the squared error in the variational bound, float32; entry 0 repeats 1."""
        acp = tables["alphas_cumprod"]
        if self.parameterization == "v":
            weights = np.ones_like(acp)
        elif self.parameterization == "x0":
            weights = (0.5 * np.sqrt(acp) / (2.0 - acp)).astype(np.float32)
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                weights = tables["betas"] ** 2 / (
                    2 * tables["posterior_variance"] * alphas * (1 - acp)
                )
        weights = weights.copy()
        weights[0] = weights[1]
        return weights

    @functools.cached_property
    def scale_array(self) -> np.ndarray:
        """Dynamic-rescale factors, float32 ``[turning_step + num_timesteps]``; ones when off."""
        base = 1.0 if self.base_scale is None else self.base_scale
        return make_scale_array(base, self.turning_step, self.num_timesteps)

    def table(self, name: str) -> np.ndarray:
        """One float32 table of `buffers`, ``[num_timesteps]``; an unknown name is a KeyError."""
        return self.buffers[name]

    def gather(self, name: str, timesteps: Array, ndim: int) -> Array:
        """Entries of a table at ``timesteps``, shaped to broadcast against a batch.

        Args:
            name: a key of `buffers`, or "scale_array".
            timesteps: int ``[b]`` or ``[b, f]``, in 0..num_timesteps-1 (not checked under jit).
            ndim: rank of the array the result multiplies, ``[b, ...]`` or ``[b, f, ...]``.

        Returns:
            float32 ``[b, 1, ...]`` or ``[b, f, 1, ...]`` of rank ``ndim``.
        """
        table = self.scale_array if name == "scale_array" else self.table(name)
        return expand(jnp.asarray(table)[timesteps], ndim)


def expand(values: Array, ndim: int) -> Array:
    """Append axes of size 1 until ``values`` (``[b]`` or ``[b, f]``) has rank ``ndim``."""
    if values.ndim > ndim:
        raise ValueError(f"cannot view shape {values.shape} with {ndim} axes")
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))
