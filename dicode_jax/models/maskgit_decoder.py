"""The image decoder of MaskGIT's VQGAN (Chang et al., 2022), as TiTok and AR-Diffusion use it.

Convolutions in the blocks have no bias. Where a block changes the width, the shortcut is a 1x1
convolution of the block's own result, and its input is dropped: so were the published weights
trained. Shape letters: n images, y x latent rows and columns, h w pixels, z c o channels.
"""

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.norm import GroupNorm
from dicode_jax.nn.resnet import Upsample, fan_in_uniform
from dicode_jax.typing import Array, Float, typechecked

NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGITDecoderConfig:
    """Sizes; the defaults are those of TiTok and AR-Diffusion, 16 pixels per latent.

    Attributes:
        z_channels: channels of what is decoded.
        channels: width of the finest level, a multiple of `num_groups`.
        channel_mult: width of each level over `channels`, the finest first.
        num_res_blocks: residual blocks in each level and before the first.
        num_groups: groups of every group norm.
    """

    z_channels: int = 256
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    num_groups: int = 32

    def __post_init__(self):
        check_counts(self, channel_mult=20, num_res_blocks=100)
        if min(self.z_channels, self.num_res_blocks, self.num_groups) < 1:
            raise ValueError("z_channels, num_res_blocks and num_groups must be at least 1")
        if self.channels < 1 or self.channels % self.num_groups:
            raise ValueError(
                f"channels must be a multiple of num_groups {self.num_groups}, got {self.channels}"
            )
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult must be whole numbers above 0, got {self.channel_mult}")

    @property
    def upsampling(self) -> int:
        """Pixels per latent along height and width."""
        return 2 ** (len(self.channel_mult) - 1)


class MaskGITBlock(nnx.Module):
    """Two normalised 3x3 convolutions, added to the input, or to a projection of themselves."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_groups: int,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        conv = functools.partial(
            nnx.Conv,
            kernel_size=(3, 3),
            padding=1,
            use_bias=False,
            kernel_init=fan_in_uniform,
            **options,
        )
        norm = functools.partial(GroupNorm, eps=NORM_EPS, num_groups=num_groups, **options)
        self.norm1, self.conv1 = norm(in_channels), conv(in_channels, out_channels)
        self.norm2, self.conv2 = norm(out_channels), conv(out_channels, out_channels)
        linear = functools.partial(Linear, use_bias=False, kernel_init=fan_in_uniform, **options)
        changes = in_channels != out_channels
        self.shortcut = linear(out_channels, out_channels) if changes else None

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w o"]:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(h))


class _Level(nnx.Module):
    def __init__(self, blocks: list[MaskGITBlock], upsample: Upsample | None):
        self.blocks, self.upsample = nnx.List(blocks), upsample

    def __call__(self, x: Array) -> Array:
        for block in self.blocks:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class MaskGITDecoder(nnx.Module):
    """Latents to images, of any range; `levels[0]` is the finest, so the last one runs first."""

    def __init__(
        self, cfg: MaskGITDecoderConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        conv = functools.partial(
            nnx.Conv, kernel_size=(3, 3), padding=1, kernel_init=fan_in_uniform, **options
        )
        block = functools.partial(MaskGITBlock, num_groups=cfg.num_groups, **options)
        width = cfg.channels * cfg.channel_mult[-1]
        self.cfg = cfg
        self.conv_in = conv(cfg.z_channels, width)
        self.middle = nnx.List([block(width, width) for _ in range(cfg.num_res_blocks)])
        levels = []
        for level in reversed(range(len(cfg.channel_mult))):
            out = cfg.channels * cfg.channel_mult[level]
            blocks = [block(out if i else width, out) for i in range(cfg.num_res_blocks)]
            levels.append(_Level(blocks, Upsample(out, **options) if level else None))
            width = out
        self.levels = nnx.List(levels[::-1])
        self.norm_out = GroupNorm(width, eps=NORM_EPS, num_groups=cfg.num_groups, **options)
        self.conv_out = conv(width, 3)

    @typechecked
    def features(self, z: Float[Array, "n y x z"]) -> Float[Array, "n h w c"]:
        """What the last convolution makes the image of."""
        x = self.conv_in(z)
        for block in self.middle:
            x = block(x)
        for level in reversed(self.levels):
            x = level(x)
        return nnx.silu(self.norm_out(x))

    def __call__(self, z: Float[Array, "n y x z"]) -> Float[Array, "n h w 3"]:
        """Images, not clipped."""
        return self.conv_out(self.features(z))
