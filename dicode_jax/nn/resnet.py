"""Residual convolution blocks and resampling shared by the autoencoder and the video UNet.

Source: the block of "Diffusion Models Beat GANs" (Dhariwal and Nichol, 2021, section 3) in the form
that latent diffusion (Rombach et al., 2022) uses. Shape letters: n leading axes, h height, w width,
c o channels, e embedding width.
"""

import functools

import jax.numpy as jnp
from flax import nnx

from dicode_jax.nn.conv import Conv, upsample_nearest
from dicode_jax.nn.dropout import dropout
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.norm import GroupNorm
from dicode_jax.typing import Array, Float, typechecked

# The default of PyTorch and so of the reference: uniform within +-1/sqrt(fan_in), with a third of
# the variance of nnx's default.
fan_in_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def group_norm_per_image(norm: GroupNorm, x: Float[Array, "*n h w c"]) -> Float[Array, "*n h w c"]:
    """Normalizes every image on its own, whatever the leading axes are."""
    return norm(x.reshape(-1, *x.shape[-3:])).reshape(x.shape)


class ResnetBlock(nnx.Module):
    """Two normalized 3x3 convolutions beside a skip connection, conditioned on an embedding or not.

    Args:
        in_channels: channels of the input, a multiple of `num_groups`.
        out_channels: channels of the output, a multiple of `num_groups`.
        embed_dim: width of the conditioning embedding; None for no conditioning.
        eps: epsilon of both group norms (1e-5 in the UNet, 1e-6 in the autoencoder).
        dropout_rate: dropout before the second convolution.
        zero_init: starts the second convolution at zero: the block is then its skip connection.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embed_dim: int | None = None,
        eps: float,
        dropout_rate: float = 0.0,
        zero_init: bool = False,
        num_groups: int = 32,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        conv = functools.partial(Conv, kernel_init=fan_in_uniform, **options)
        self.dropout_rate = dropout_rate
        self.norm1 = GroupNorm(in_channels, eps=eps, num_groups=num_groups, **options)
        self.conv1 = conv(in_channels, out_channels)
        linear = functools.partial(Linear, kernel_init=fan_in_uniform, **options)
        self.embed_proj = linear(embed_dim, out_channels) if embed_dim is not None else None
        self.norm2 = GroupNorm(out_channels, eps=eps, num_groups=num_groups, **options)
        last_init = nnx.initializers.zeros_init() if zero_init else fan_in_uniform
        self.conv2 = conv(out_channels, out_channels, kernel_init=last_init)
        self.shortcut = linear(in_channels, out_channels) if in_channels != out_channels else None

    def __call__(
        self,
        x: Float[Array, "*n h w c"],
        embed: Float[Array, "*m e"] | None = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*n h w o"]:
        """`embed` has the leading axes of `x`, or axes of size 1 that broadcast against them."""
        h = self.conv1(nnx.silu(group_norm_per_image(self.norm1, x)))
        if self.embed_proj is not None:
            if embed is None:
                raise ValueError("this block is conditioned on an embedding; got embed=None")
            h = h + self.embed_proj(nnx.silu(embed))[..., None, None, :]
        h = nnx.silu(group_norm_per_image(self.norm2, h))
        h = dropout(h, self.dropout_rate, deterministic=deterministic, rngs=rngs)
        h = self.conv2(h)
        return (x if self.shortcut is None else self.shortcut(x)) + h


@typechecked
def average_pool(x: Float[Array, "*n h w c"]) -> Float[Array, "*n h2 w2 c"]:
    """Halves height and width by averaging 2x2 squares; an odd last row or column is dropped."""
    *lead, h, w, c = x.shape
    x = x[..., : h // 2 * 2, : w // 2 * 2, :]
    return x.reshape(*lead, h // 2, 2, w // 2, 2, c).mean((-4, -2))


class Downsample(nnx.Module):
    """Halves height and width: a 3x3 convolution of stride 2, or average pooling.

    Args:
        channels: channels of input and output.
        use_conv: False for average pooling, which has no parameters.
        padding: zeros before and after each side: 1 in the UNet, (0, 1) in the autoencoder.
    """

    def __init__(
        self,
        channels: int,
        *,
        use_conv: bool = True,
        padding: int | tuple[int, int] = 1,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        pair = (padding, padding) if isinstance(padding, int) else padding
        conv = functools.partial(Conv, strides=2, padding=(pair, pair), kernel_init=fan_in_uniform)
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = conv(channels, channels, **options) if use_conv else None

    def __call__(self, x: Float[Array, "*n h w c"]) -> Float[Array, "*n h2 w2 c"]:
        return average_pool(x) if self.conv is None else self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width by nearest neighbour, then an optional 3x3 convolution."""

    def __init__(
        self,
        channels: int,
        *,
        use_conv: bool = True,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(Conv, kernel_init=fan_in_uniform)
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = conv(channels, channels, **options) if use_conv else None

    def __call__(self, x: Float[Array, "*n h w c"]) -> Float[Array, "*n h2 w2 c"]:
        return upsample_nearest(x) if self.conv is None else self.conv.of_doubled(x)
