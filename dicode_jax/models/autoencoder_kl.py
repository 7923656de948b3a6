"""KL autoencoder of images, applied to video frame by frame (Rombach et al., 2022, section 3.1).

Follows the first stage of latent diffusion as DynamiCrafter and DiCoDe use it; pixels in [-1, 1].
Shape letters: n images, b batch, f frames, h w pixels, y x latent rows and columns, c channels.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.distributions.diagonal_gaussian import DiagonalGaussian
from dicode_jax.nn.attention import attend
from dicode_jax.nn.conv import Conv
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.norm import GroupNorm
from dicode_jax.nn.resnet import Downsample, ResnetBlock, Upsample, fan_in_uniform
from dicode_jax.typing import Array, Float, typechecked

NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """Sizes of the autoencoder; the defaults are those of Stable Diffusion, 83,653,863 parameters.

    Attributes:
        channels: width of the first level, a multiple of `num_groups`.
        channel_mult: width of each level over `channels`.
        num_res_blocks: residual blocks per level of the encoder (the decoder has one more).
        attn_resolutions: levels with self-attention, named by image size from `resolution` down.
        resolution: nominal image size; only decides where `attn_resolutions` falls.
        in_channels: channels of the input image.
        out_channels: channels of the decoded image.
        z_channels: channels at the bottleneck.
        embed_dim: channels of the latents.
        dropout: rate inside the residual blocks.
        resamp_with_conv: False resamples by pooling and repeating only.
        mid_attention: self-attention in the middle of encoder and decoder.
        tanh_out: squashes the decoded image to (-1, 1).
        scale_factor: multiplies latents in `encode_latents`.
        num_groups: groups of every group norm; the original has 32, which asks for wide levels.
    """

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = ()
    resolution: int = 256
    in_channels: int = 3
    out_channels: int = 3
    z_channels: int = 4
    embed_dim: int = 4
    dropout: float = 0.0
    resamp_with_conv: bool = True
    mid_attention: bool = True
    tanh_out: bool = False
    scale_factor: float = 0.18215
    num_groups: int = 32

    RETIRED: ClassVar = {"double_z": (True, "a posterior of mean and log-variance")}

    def __post_init__(self):
        check_counts(self, channel_mult=20, num_res_blocks=100)
        if self.channels < 1 or self.channels % self.num_groups:
            raise ValueError(
                f"channels must be a multiple of num_groups {self.num_groups}, got {self.channels}"
            )
        if not self.channel_mult:
            raise ValueError("channel_mult must have at least one level, got ()")
        if self.scale_factor <= 0:
            raise ValueError(f"scale_factor must be positive, got {self.scale_factor}")

    @property
    def downsampling(self) -> int:
        """Pixels per latent along height and width."""
        return 2 ** (len(self.channel_mult) - 1)


class SelfAttention2D(nnx.Module):
    """Single-head self-attention over all pixels, with a residual connection."""

    def __init__(
        self,
        channels: int,
        *,
        num_groups: int = 32,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = functools.partial(
            Linear, channels, channels, kernel_init=fan_in_uniform, **options
        )
        self.norm = GroupNorm(channels, eps=NORM_EPS, num_groups=num_groups, **options)
        self.q, self.k, self.v, self.out = linear(), linear(), linear(), linear()

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        _, h, _, c = x.shape
        tokens = rearrange(self.norm(x), "n h w c -> n (h w) c")
        attended = attend(self.q(tokens), self.k(tokens), self.v(tokens), head_dim=c)  # one head
        return x + rearrange(self.out(attended), "n (h w) c -> n h w c", h=h)


class Level(nnx.Module):
    """One resolution: residual blocks, each followed by attention or not, then resampling."""

    def __init__(self, blocks: list, attentions: list, resample: nnx.Module | None):
        self.blocks = nnx.List(blocks)
        self.attentions = nnx.List(attentions)  # empty, or as many as blocks
        self.resample = resample

    def __call__(self, x: Array, **dropout) -> Array:
        for i, block in enumerate(self.blocks):
            x = block(x, **dropout)
            if self.attentions:
                x = self.attentions[i](x)
        return x if self.resample is None else self.resample(x)


class Middle(nnx.Module):
    """Residual block, attention over all pixels, residual block."""

    def __init__(self, make_block, channels: int, use_attention: bool, **options):
        self.block1 = make_block(channels, channels)
        self.attention = SelfAttention2D(channels, **options) if use_attention else None
        self.block2 = make_block(channels, channels)

    def __call__(self, x: Array, **dropout) -> Array:
        x = self.block1(x, **dropout)
        x = x if self.attention is None else self.attention(x)
        return self.block2(x, **dropout)


class _Layers:
    """Makes the layers of one configuration."""

    def __init__(self, cfg: AutoencoderKLConfig, options: dict):
        self.cfg, self.options = cfg, options
        self.grouped = {"num_groups": cfg.num_groups, **options}
        self.conv = functools.partial(Conv, kernel_init=fan_in_uniform, **options)
        self.block = functools.partial(
            ResnetBlock, eps=NORM_EPS, dropout_rate=cfg.dropout, **self.grouped
        )

    def level(self, width: int, mult: int, num_blocks: int, resolution: int, resample) -> Level:
        """A level that changes the width; `resample` makes its last layer, or is None."""
        out = mult * self.cfg.channels
        blocks, attentions = [], []
        for i in range(num_blocks):
            blocks.append(self.block(out if i else width, out))
            if resolution in self.cfg.attn_resolutions:
                attentions.append(SelfAttention2D(out, **self.grouped))
        return Level(blocks, attentions, resample and resample(out))

    def middle(self, width: int) -> Middle:
        return Middle(self.block, width, self.cfg.mid_attention, **self.grouped)

    def norm(self, width: int) -> GroupNorm:
        return GroupNorm(width, eps=NORM_EPS, **self.grouped)


class Encoder(nnx.Module):
    """Image to the unclamped moments before the quantization convolution."""

    def __init__(self, cfg: AutoencoderKLConfig, **options):
        make = _Layers(cfg, options)
        # The reference pads one row and column at the end only.
        resample = functools.partial(
            Downsample, use_conv=cfg.resamp_with_conv, padding=(0, 1), **options
        )
        self.conv_in = make.conv(cfg.in_channels, cfg.channels)
        width, resolution, last = cfg.channels, cfg.resolution, len(cfg.channel_mult) - 1
        levels = []
        for i, mult in enumerate(cfg.channel_mult):
            shrink = resample if i < last else None
            levels.append(make.level(width, mult, cfg.num_res_blocks, resolution, shrink))
            width, resolution = mult * cfg.channels, resolution // 2
        self.levels = nnx.List(levels)
        self.middle = make.middle(width)
        self.norm_out = make.norm(width)
        self.conv_out = make.conv(width, 2 * cfg.z_channels)

    def __call__(self, x: Float[Array, "n h w c"], **dropout) -> Float[Array, "n y x z2"]:
        h = self.conv_in(x)
        for level in self.levels:
            h = level(h, **dropout)
        h = self.middle(h, **dropout)
        return self.conv_out(nnx.silu(self.norm_out(h)))


class Decoder(nnx.Module):
    """Latent (after the post-quantization convolution) to image.

    As in the encoder `levels[0]` is the finest, so they run from the last to the first.
    """

    def __init__(self, cfg: AutoencoderKLConfig, **options):
        make = _Layers(cfg, options)
        resample = functools.partial(Upsample, use_conv=cfg.resamp_with_conv, **options)
        last = len(cfg.channel_mult) - 1
        width, resolution = cfg.channels * cfg.channel_mult[-1], cfg.resolution // 2**last
        self.conv_in = make.conv(cfg.z_channels, width)
        self.middle = make.middle(width)
        levels = []
        for i, mult in enumerate(reversed(cfg.channel_mult)):
            grow = resample if i < last else None
            levels.append(make.level(width, mult, cfg.num_res_blocks + 1, resolution, grow))
            width, resolution = mult * cfg.channels, 2 * resolution
        self.levels = nnx.List(levels[::-1])
        self.norm_out = make.norm(width)
        self.conv_out = make.conv(width, cfg.out_channels)
        self.tanh_out = cfg.tanh_out

    def __call__(self, z: Float[Array, "n y x z"], **dropout) -> Float[Array, "n h w c"]:
        h = self.middle(self.conv_in(z), **dropout)
        for level in reversed(self.levels):
            h = level(h, **dropout)
        h = self.conv_out(nnx.silu(self.norm_out(h)))
        return jnp.tanh(h) if self.tanh_out else h


class AutoencoderKL(nnx.Module):
    """Image autoencoder with a diagonal Gaussian posterior.

    `encode` and `decode` work on images and know no scale factor; the `*_video` forms add a frame
    axis; `encode_latents` and `decode_latents` are what diffusion uses: video, sampled, scaled.
    """

    def __init__(
        self, cfg: AutoencoderKLConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = functools.partial(Linear, kernel_init=fan_in_uniform, **options)
        self.cfg = cfg
        self.encoder = Encoder(cfg, **options)
        self.decoder = Decoder(cfg, **options)
        self.quant = linear(2 * cfg.z_channels, 2 * cfg.embed_dim)
        self.post_quant = linear(cfg.embed_dim, cfg.z_channels)

    @typechecked
    def moments(
        self,
        x: Float[Array, "n h w c"],
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "n y x z2"]:
        """Mean and unclamped log-variance of the posterior, side by side on the last axis.

        Raises:
            ValueError: the channels or the size of the images do not fit the config.
        """
        _, h, w, c = x.shape
        step = self.cfg.downsampling
        if c != self.cfg.in_channels:
            raise ValueError(f"images must have {self.cfg.in_channels} channels (last), got {c}")
        if h % step or w % step:
            raise ValueError(
                f"image sides must be multiples of {step}, got {h}x{w}: resize or crop first"
            )
        return self.quant(self.encoder(x, deterministic=deterministic, rngs=rngs))

    def encode(self, x: Float[Array, "n h w c"], **dropout) -> DiagonalGaussian:
        """Posterior of images in [-1, 1]; latents [n, h/8, w/8, embed_dim] with default levels."""
        return DiagonalGaussian.from_moments(self.moments(x, **dropout))

    @typechecked
    def decode(
        self,
        z: Float[Array, "n y x z"],
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "n h w c"]:
        """Images from unscaled latents; not clipped to [-1, 1].

        Raises:
            ValueError: the latents do not have `embed_dim` channels.
        """
        if z.shape[-1] != self.cfg.embed_dim:
            raise ValueError(
                f"latents must have {self.cfg.embed_dim} channels (last), got {z.shape[-1]}"
            )
        return self.decoder(self.post_quant(z), deterministic=deterministic, rngs=rngs)

    @typechecked
    def encode_video(
        self, x: Float[Array, "b f h w c"], *, per_frame: bool = False
    ) -> DiagonalGaussian:
        """Posterior of every frame, [b, f, ...]; `per_frame` maps over frames to save memory."""
        moments = _over_frames(self.moments, x, per_frame)
        return DiagonalGaussian.from_moments(moments)

    @typechecked
    def decode_video(
        self, z: Float[Array, "b f y x z"], *, per_frame: bool = False
    ) -> Float[Array, "b f h w c"]:
        """Frames from unscaled latents; `per_frame` maps over frames to save memory."""
        return _over_frames(self.decode, z, per_frame)

    def encode_latents(
        self,
        x: Float[Array, "b f h w c"],
        key: Array | None = None,
        *,
        noise: Float[Array, "b f y x z"] | None = None,
        per_frame: bool = False,
    ) -> Float[Array, "b f y x z"]:
        """Scaled latents of a video: a posterior sample, or the mean without key and noise."""
        posterior = self.encode_video(x, per_frame=per_frame)
        draw = key is not None or noise is not None
        latents = posterior.sample(key, noise=noise) if draw else posterior.mode()
        return self.cfg.scale_factor * latents

    def decode_latents(
        self, latents: Float[Array, "b f y x z"], *, per_frame: bool = False
    ) -> Float[Array, "b f h w c"]:
        """Video from scaled latents; not clipped to [-1, 1]."""
        return self.decode_video(latents / self.cfg.scale_factor, per_frame=per_frame)


def _over_frames(function, x: Array, per_frame: bool) -> Array:
    """Applies an image function to [b, f, ...], all frames at once or one after the other."""
    if per_frame:
        y = jax.lax.map(function, rearrange(x, "b f ... -> f b ..."))
        return rearrange(y, "f b ... -> b f ...")
    y = function(rearrange(x, "b f ... -> (b f) ..."))
    return rearrange(y, "(b f) ... -> b f ...", b=len(x))
