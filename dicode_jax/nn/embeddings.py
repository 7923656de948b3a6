"""Sinusoidal embedding of diffusion timesteps and frame strides."""

import math

import jax.numpy as jnp

from dicode_jax.typing import Array, Float, Int, typechecked


@typechecked
def timestep_embedding(
    timesteps: Int[Array, "..."] | Float[Array, "..."], dim: int, *, max_period: float = 10_000.0
) -> Float[Array, "... {dim}"]:
    """Embeds scalars as `[cos(t w_0) .. | sin(t w_0) ..]`, cosine half first.

    Frequencies are `max_period ** (-i / half)` with `half = dim // 2`; an odd `dim` gets a zero at
    the end. Source: `timestep_embedding` of latent-diffusion, as DynamiCrafter uses it.
    """
    half = dim // 2
    freqs = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps[..., None].astype(jnp.float32) * freqs
    parts = [jnp.cos(angles), jnp.sin(angles)]
    if dim % 2:
        parts.append(jnp.zeros_like(angles[..., :1]))
    return jnp.concatenate(parts, axis=-1)
