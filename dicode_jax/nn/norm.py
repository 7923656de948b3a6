"""Normalisation, with statistics in float32.

`nnx.GroupNorm` computes the same thing as the one here, which sums space before it groups channels:
that was measured three times faster on CPU (64 channels at 32x32).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.typing import Array, Float, typechecked


class GroupNorm(nnx.Module):
    """Normalises groups of channels with statistics pooled over all axes but batch and group.

    A video `[b, f, h, w, c]` is therefore pooled over its frames as well; reshape to
    `[(b f), h, w, c]` for statistics of each frame alone.

    Args:
      channels: Size of the last axis; must be divisible by `num_groups`.
      eps: Added to the variance. 1e-5 in the UNet's residual blocks, 1e-6 in its transformers and
        everywhere in the autoencoder.
      num_groups: Number of groups of consecutive channels.

    Raises:
      ValueError: `channels` is not divisible by `num_groups`.
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float,
        num_groups: int = 32,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if channels % num_groups:
            raise ValueError(
                f"channels ({channels}) must be divisible by num_groups ({num_groups})"
            )
        self.channels, self.num_groups, self.eps, self.dtype = channels, num_groups, eps, dtype
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    @typechecked
    def __call__(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:
        shape, groups = x.shape, self.num_groups
        dtype = self.dtype or x.dtype
        x = x.reshape(shape[0], -1, self.channels).astype(jnp.float32)  # [b, p, c]
        count = x.shape[1] * (self.channels // groups)

        def pool(y: Array) -> Array:  # [b, p, c] -> group means, repeated: [b, 1, c]
            sums = y.sum(axis=1).reshape(shape[0], groups, -1).sum(axis=-1, keepdims=True)
            means = jnp.broadcast_to(sums / count, (shape[0], groups, self.channels // groups))
            return means.reshape(shape[0], 1, self.channels)

        centred = x - pool(x)
        inv_std = jax.lax.rsqrt(pool(jnp.square(centred)) + self.eps)
        scale = inv_std * self.scale[...].astype(jnp.float32)[None, None]
        y = centred * scale + self.bias[...].astype(jnp.float32)[None, None]
        return y.astype(dtype).reshape(shape)


def layer_norm(dim: int, *, eps: float = 1e-5, **options) -> nnx.LayerNorm:
    """Layer norm whose variance is that of the centred values, as in PyTorch."""
    return nnx.LayerNorm(dim, epsilon=eps, use_fast_variance=False, **options)
