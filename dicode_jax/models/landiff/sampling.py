"""Latents of a window with LanDiff's denoiser: dynamic guidance, SDE-DPM-Solver++(2M), a prefix."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.guidance import cosine_ramp, guide
from dicode_jax.diffusion.guided import first_state, guided_denoise
from dicode_jax.diffusion.samplers.base import (
    Steps,
    make_steps,
    per_sample_normal,
    run_steps,
)
from dicode_jax.diffusion.samplers.subsampled import SubsampledDPM, subsampled_time_grid
from dicode_jax.models.landiff.dit import Denoiser
from dicode_jax.nn.rngs import fold
from dicode_jax.typing import Array, Float

RAMPS = ("released", "smooth")
RELEASED_RAMP_STEPS = 50  # where the release's guidance ends its ramp, whatever its sampler's steps


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowSampling:
    """How a window is sampled; a pytree, whose guidance scale is traced unless it is 0.

    Attributes:
      num_inference_steps: Sampling steps.
      guidance_scale: The most by which guidance exceeds 1; 0 for the conditional branch alone.
      ramp: "released" as the release has it, where guidance jumps between 1 and 1 + scale from step
        to step; "smooth", from 1 at the first step up.
      ramp_steps: Steps of the ramp; when None the release's 50 of the released one, and
        `num_inference_steps` of the smooth one.
      ramp_exponent: How late it rises.
      history_noise: Timestep of the noise under which the network sees a prefix, or that of the
        window itself where there is less left; 0 shows it clean, as the original.
      batch_guidance: Evaluate both branches in one call, which takes more memory.

    Raises:
      ValueError: A number is out of range, or the ramp has no such name.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    ramp: str = "released"
    ramp_steps: int | None = None
    ramp_exponent: int = 5
    history_noise: int = 0
    batch_guidance: bool = False

    def __post_init__(self):
        for name in ("num_inference_steps", "ramp_steps", "ramp_exponent"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.history_noise < 0:
            raise ValueError(f"history_noise must not be negative, got {self.history_noise}")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must not be negative, got {self.guidance_scale}")
        if self.ramp not in RAMPS:
            raise ValueError(f"ramp must be one of {', '.join(RAMPS)}, got {self.ramp!r}")

    @property
    def is_guided(self) -> bool:
        """Whether the unconditional branch runs at all."""
        return isinstance(self.guidance_scale, jax.Array) or self.guidance_scale != 0

    def tree_flatten(self):
        static = dict(vars(self))
        scale = static.pop("guidance_scale")
        if not self.is_guided:
            return (), (("guidance_scale", scale), *static.items())
        return (scale,), tuple(static.items())

    @classmethod
    def tree_unflatten(cls, static, values):
        config = object.__new__(cls)  # the scale may be a tracer, which cannot be checked
        vars(config).update(static, **dict(zip(("guidance_scale",), values)))
        return config


def guidance_ramp(cfg: WindowSampling, timesteps: np.ndarray) -> np.ndarray:
    """Of guidance `1 + guidance_scale * ramp` at each visited timestep, float64 in 0..1."""
    if cfg.ramp == "smooth":
        steps, count = np.arange(len(timesteps)), cfg.num_inference_steps
    else:
        steps, count = len(timesteps) - timesteps, RELEASED_RAMP_STEPS
    return cosine_ramp(steps.tolist(), cfg.ramp_steps or count, cfg.ramp_exponent)


def window_steps(
    denoiser: Denoiser,
    context: Float[Array, "b l e"],
    semantic: Float[Array, "#b f h w c"],
    cfg: WindowSampling,
    shape: tuple[int, ...],
    *,
    keys: Array | None,
    prefix: Float[Array, "b p h w c"] | None = None,
    noise: Float[Array, "s b f h w c"] | None = None,
) -> Steps:
    """The steps of `sample_window`, whose arguments and errors these are, to be taken some at a
    time.

    Args:
      shape: Of the latents, `[b, f, h, w, c]`.
    """
    num_known = 0 if prefix is None else prefix.shape[1]
    wanted = (shape[0], num_known, *shape[2:])
    if prefix is not None and (prefix.shape != wanted or not 0 < num_known < shape[1]):
        raise ValueError(
            f"a prefix leaves at least one frame of a window {shape}, got {prefix.shape}"
        )
    schedule = denoiser.cfg.schedule
    grid = subsampled_time_grid(cfg.num_inference_steps, schedule.num_timesteps)
    semantic = jnp.broadcast_to(semantic, shape)
    branches = [(context, semantic)]
    if cfg.is_guided:
        branches.append((jnp.zeros_like(context), semantic))
    ramp = jnp.asarray(guidance_ramp(cfg, grid[:-1]), jnp.float32)

    def join(outputs, step):
        return guide(outputs[0], outputs[1], 1.0 + cfg.guidance_scale * ramp[step])

    sampler = SubsampledDPM(schedule=schedule)
    signals, hidden = _prefix_levels(sampler, cfg.history_noise, grid), None
    if prefix is not None and cfg.history_noise:
        if keys is None:
            raise ValueError("history_noise needs keys (one per sample)")
        hidden = per_sample_normal(keys, 2, prefix.shape[1:])

    def put_prefix(x, step):
        if prefix is None:
            return x
        shown = prefix
        if hidden is not None:
            signal = jnp.asarray(signals, jnp.float32)[step]
            noised = signal * prefix + jnp.sqrt(1 - signal**2) * hidden
            shown = jnp.where(step < len(grid) - 1, noised, prefix)
        return x.at[:, :num_known].set(shown.astype(x.dtype))

    return make_steps(
        guided_denoise(
            lambda x, times, condition: denoiser(x, times, *condition),
            branches,
            join,
            batched=cfg.batch_guidance,
        ),
        sampler,
        shape,
        grid,
        keys=None if keys is None else fold(keys, 1),
        noise=noise,
        project=None if prefix is None else put_prefix,
    )


def sample_window(
    denoiser: Denoiser,
    context: Float[Array, "b l e"],
    semantic: Float[Array, "#b f h w c"],
    cfg: WindowSampling,
    *,
    keys: Array | None,
    prefix: Float[Array, "b p h w c"] | None = None,
    x_init: Float[Array, "b f h w c"] | None = None,
    noise: Float[Array, "s b f h w c"] | None = None,
    return_trajectory: bool = False,
) -> tuple[Float[Array, "b f h w c"], Any]:
    """Samples scaled latents, float32. Pure: jit it with ``cfg`` as an argument.

    Args:
      denoiser: The network.
      context: Encoded text; guidance moves away from zeros.
      semantic: See `Denoiser.semantic_latents`; its frames are those of the window. One row may
        serve all samples.
      cfg: Settings.
      keys: One per sample, `[b]`; a sample depends on its key alone.
      prefix: The first latents of the window, which are known: the network sees them clean in every
        step (but for `history_noise`), and they come back as they are.
      x_init: Starting noise instead of the keys'.
      noise: Noise of every step instead of the keys'; that of the last is not used.
      return_trajectory: Also return the states behind all steps.

    Returns:
      The latents, and the states or None. Weights or prompts out of range give numbers that are not
      finite, which the caller must look for.

    Raises:
      ValueError: Neither keys nor noise, too many steps, or a prefix that is no beginning.
    """
    x_init = first_state(x_init, keys, semantic.shape[1:])
    steps = window_steps(
        denoiser, context, semantic, cfg, x_init.shape, keys=keys, prefix=prefix, noise=noise
    )
    return run_steps(steps, steps.begin(x_init), return_trajectory)


def _prefix_levels(sampler: SubsampledDPM, timestep: int, grid: np.ndarray) -> np.ndarray:
    """Factor of the clean prefix at each step, float64 `[steps + 1]`; 1 behind the last."""
    schedule = sampler.schedule
    if timestep >= schedule.num_timesteps:
        raise ValueError(
            f"history_noise must be below the {schedule.num_timesteps} timesteps, got {timestep}"
        )
    return np.maximum(np.sqrt(schedule.alphas_cumprod64[timestep]), sampler.signals(grid))
