"""Guided sampling of video latents with a `UNet3D` from ready contexts.

What DynamiCrafter (arXiv 2310.12190) and Divot (arXiv 2412.04432) share: a context of tokens with
and without the condition, and latents that may be concatenated.
"""

from typing import Any

import jax.numpy as jnp

from dicode_jax.diffusion.guided import SamplingConfig, first_state, guided_steps
from dicode_jax.diffusion.samplers.base import Steps, run_steps
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.models.unet3d import UNet3D
from dicode_jax.typing import Array, Float


def latent_conditions(
    context: Float[Array, "b l d"],
    null_context: Float[Array, "b l d"],
    concat: Float[Array, "b f h w c"] | None,
    cfg: SamplingConfig,
) -> list[Any]:
    """What `latent_steps` takes; see `sample_latents`."""
    contexts = (context, null_context) if cfg.is_guided else (context,)
    return [(tokens, concat) for tokens in contexts]


def latent_steps(
    unet: UNet3D,
    schedule: NoiseSchedule,
    conditions: list[Any],
    keys: Array | None,
    latent_shape: tuple[int, ...],
    cfg: SamplingConfig,
    *,
    noise: Float[Array, "s b f h w c"] | None = None,
) -> Steps:
    """The steps of `sample_latents`, whose arguments and errors these are, to be taken some at a
    time.

    Args:
      conditions: Of `latent_conditions`.
    """
    if cfg.drop_tokens is not None:
        raise ValueError("drop_tokens is an option of deep tokens alone")

    def inputs(x, times, condition, fs):
        tokens, beside = condition
        if beside is not None:  # the same in all branches
            x = jnp.concatenate([x, beside[: len(x)].astype(x.dtype)], axis=-1)
        return x, times, tokens, fs[: len(x)]

    return guided_steps(
        lambda *args: unet(*inputs(*args)),
        conditions,
        schedule,
        cfg,
        (conditions[0][0].shape[0], cfg.num_frames, *latent_shape),
        keys=keys,
        noise=noise,
        predict_deep=lambda *args: unet.with_deep(*inputs(*args[:-1]), deep=args[-1]),
        spreads=True,
    )


def sample_latents(
    unet: UNet3D,
    schedule: NoiseSchedule,
    context: Float[Array, "b l d"],
    null_context: Float[Array, "b l d"],
    concat: Float[Array, "b f h w c"] | None,
    keys: Array | None,
    latent_shape: tuple[int, int, int],
    cfg: SamplingConfig,
    *,
    x_init: Float[Array, "b f h w c"] | None = None,
    noise: Float[Array, "s b f h w c"] | None = None,
) -> Float[Array, "b f h w c"]:
    """Samples scaled latents, float32. Pure: jit it with ``cfg`` as an argument.

    Args:
      context: Tokens of the condition; text tokens first where there are any.
      null_context: Tokens without it, for guidance.
      concat: Latents put after the noisy ones on channels, in both branches; None for none.
      keys: One per sample; a sample depends on its own key alone.
      latent_shape: Height, width and channels of the latents.
      x_init, noise: Starting noise and the noise of every step instead of the keys'.

    Raises:
      ValueError: Neither keys nor noise, a number of steps that the schedule cannot hold, or an
        option that only a model with deep tokens has.
    """
    conditions = latent_conditions(context, null_context, concat, cfg)
    steps = latent_steps(unet, schedule, conditions, keys, latent_shape, cfg, noise=noise)
    x_init = first_state(x_init, keys, (cfg.num_frames, *latent_shape))
    return run_steps(steps, steps.begin(x_init))[0]
