"""Guided sampling of video latents with a `UNet3D` from ready contexts.

What DynamiCrafter (arXiv 2310.12190) and Divot (arXiv 2412.04432) share: a context of tokens with
and without the condition, latents that may be concatenated, DDIM, guidance with rescale.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dicode_jax.diffusion.guidance import guide, rescale_guidance
from dicode_jax.diffusion.samplers.base import per_sample_normal, sample
from dicode_jax.diffusion.samplers.ddim import DDIM
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.diffusion.time_grid import SPACINGS, ddim_time_grid
from dicode_jax.models.unet3d import UNet3D
from dicode_jax.nn.rngs import fold
from dicode_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoSamplingConfig:
    """How `sample_latents` samples.

    Attributes:
      num_frames: Frames of the video.
      num_inference_steps: DDIM steps.
      guidance_scale: Strength of the condition; with 1 the unconditional branch is left out.
      guidance_rescale: See `dicode_jax.diffusion.guidance.rescale_guidance`.
      eta: 0 deterministic, 1 ancestral.
      spacing: One of `dicode_jax.diffusion.time_grid.SPACINGS`.
      fs: Frame stride or frames per second that the UNet is told.
      table_dtype: Rounding of the tables, see `dicode_jax.diffusion.samplers.ddim.DDIM`.
    """

    num_frames: int = 16
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.7
    eta: float = 1.0
    spacing: str = "uniform"
    fs: int = 3
    table_dtype: str = "float32"

    def __post_init__(self):
        for name in ("num_frames", "num_inference_steps", "fs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.spacing not in SPACINGS:
            raise ValueError(f"spacing must be one of {SPACINGS}, got {self.spacing!r}")
        for name in ("guidance_rescale", "eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {self.guidance_scale}")


def sample_latents(
    unet: UNet3D,
    schedule: NoiseSchedule,
    context: Float[Array, "b l d"],
    null_context: Float[Array, "b l d"],
    concat: Float[Array, "b f h w c"] | None,
    keys: Array | None,
    latent_shape: tuple[int, int, int],
    cfg: VideoSamplingConfig,
    *,
    x_init: Float[Array, "b f h w c"] | None = None,
    noise: Float[Array, "s b f h w c"] | None = None,
) -> Float[Array, "b f h w c"]:
    """Samples scaled latents, float32. Pure: jit it with the configs static.

    Args:
      context: Tokens of the condition; text tokens first where there are any.
      null_context: Tokens without it, for guidance.
      concat: Latents put after the noisy ones on channels, in both branches; None for none.
      keys: One per sample; a sample depends on its own key alone.
      latent_shape: Height, width and channels of the latents.
      x_init, noise: Starting noise and the noise of every step instead of the keys'.

    Raises:
      ValueError: Neither keys nor noise, or a number of steps that the schedule cannot hold.
    """
    if x_init is None:
        if keys is None:
            raise ValueError("sample_latents needs keys (one per sample) or x_init")
        x_init = per_sample_normal(keys, 0, (cfg.num_frames, *latent_shape))
    step_keys = None if keys is None else fold(keys, 1)
    fs = jnp.full((context.shape[0],), cfg.fs, jnp.int32)
    branches = jnp.stack([context, null_context])

    def predict(x, t, tokens):
        if concat is not None:
            x = jnp.concatenate([x, concat.astype(x.dtype)], axis=-1)
        return unet(x, t, tokens, fs).astype(jnp.float32)

    def denoise(x, t):
        if cfg.guidance_scale == 1.0:
            return predict(x, t, context)
        # A loop over the branches: the network is compiled once, and holds one batch at a time.
        cond, uncond = jax.lax.map(lambda tokens: predict(x, t, tokens), branches)
        guided = guide(cond, uncond, cfg.guidance_scale)
        if cfg.guidance_rescale > 0:
            guided = rescale_guidance(guided, cond, cfg.guidance_rescale)
        return guided

    latents, _ = sample(
        denoise,
        DDIM(schedule=schedule, eta=cfg.eta, table_dtype=cfg.table_dtype),
        x_init.astype(jnp.float32),
        ddim_time_grid(cfg.spacing, cfg.num_inference_steps, schedule.num_timesteps),
        keys=step_keys,
        noise=noise,
    )
    return latents
