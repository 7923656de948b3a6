"""CogVideoX's causal autoencoder of videos (Yang et al., arXiv 2408.06072, section 2.1).

Frames are 4 k + 1, and 8 m + 1 where they go in chunks or are decoded again: the first becomes a
latent of its own, each four behind it one. Norms pool over all frames of a call, so that chunks
give other numbers than the whole. The release decodes in chunks and encodes the whole, and so does
this; diffusers encodes in chunks too, which is an option here (`in_chunks`) and takes the memory of
a chunk. Pixels lie in [-1, 1].
Shape letters: b videos, f frames, h w pixels, t y x frames, rows and columns of latents, c z
channels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.distributions.diagonal_gaussian import DiagonalGaussian
from dicode_jax.nn.causal_conv import CausalConv, Past
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.norm import GroupNorm
from dicode_jax.nn.resnet import Downsample, Upsample, fan_in_uniform
from dicode_jax.typing import Array, Float, typechecked

EPS = 1e-6
Cache = tuple[Array, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderCausal3DConfig:
    """Sizes; the defaults are those of CogVideoX-2b, 215,583,907 parameters.

    Attributes:
      channels: Width that the levels multiply, a multiple of `num_groups`.
      encoder_mult, decoder_mult: Width of each level over `channels`, the finest first.
      encoder_blocks: Residual blocks per level of the encoder.
      decoder_blocks: The same of the decoder.
      z_channels: Channels of a latent.
      time_factor: Frames that make a latent, a power of 2: so many of the first halvings in space
        halve time as well.
      scale_factor: Multiplies latents in `encode_latents`.
      num_groups: Groups of every group norm.
    """

    channels: int = 128
    encoder_mult: tuple[int, ...] = (1, 2, 2, 4)
    decoder_mult: tuple[int, ...] = (1, 2, 2, 4)
    encoder_blocks: int = 3
    decoder_blocks: int = 4
    z_channels: int = 16
    time_factor: int = 4
    scale_factor: float = 1.15258426
    num_groups: int = 32

    def __post_init__(self):
        check_counts(self, encoder_mult=20, decoder_mult=20, encoder_blocks=100, decoder_blocks=100)
        for name in ("encoder_blocks", "decoder_blocks", "z_channels", "num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.channels < 1 or self.channels % self.num_groups:
            raise ValueError(
                f"channels must be a multiple of num_groups {self.num_groups}, got {self.channels}"
            )
        if not self.encoder_mult or len(self.encoder_mult) != len(self.decoder_mult):
            raise ValueError(
                f"encoder and decoder must have the same number of levels, got {self.encoder_mult} "
                f"and {self.decoder_mult}"
            )
        if min(self.encoder_mult + self.decoder_mult) < 1:
            raise ValueError("multiples of the width must be positive")
        if self.time_factor not in [2**i for i in range(len(self.encoder_mult))]:
            raise ValueError(
                f"time_factor must be a power of 2, at most {self.downsampling}, got "
                f"{self.time_factor}"
            )
        if not 0 < self.scale_factor < math.inf:
            raise ValueError(f"scale_factor must be positive, got {self.scale_factor}")

    @property
    def downsampling(self) -> int:
        """Pixels per latent along height and width."""
        return 2 ** (len(self.encoder_mult) - 1)

    @property
    def time_levels(self) -> int:
        """How often time is halved."""
        return self.time_factor.bit_length() - 1

    def num_latents(self, num_frames: int) -> int:
        """Frames of latents that a video has, encoded whole.

        Raises:
          ValueError: The video has another number of frames than `time_factor` k + 1.
        """
        return _num_latents(num_frames, self.time_factor, self.time_factor)

    def num_decodable(self, num_frames: int) -> int:
        """Frames of latents that a video has which is encoded in chunks, or decoded again.

        Raises:
          ValueError: The video has another number of frames than twice `time_factor` m + 1, whose
            latents lie in pairs behind the first one.
        """
        return _num_latents(num_frames, self.time_factor, 2 * self.time_factor)


def _num_latents(num_frames: int, time_factor: int, step: int) -> int:
    if num_frames < 1 or (num_frames - 1) % step:
        raise ValueError(
            f"a video must have {step} {'k' if step == time_factor else 'm'} + 1 frames (1, "
            f"{step + 1}, {2 * step + 1} ...), got {num_frames}"
        )
    return (num_frames - 1) // time_factor + 1


class SpatialNorm(nnx.Module):
    """Group norm, then scale and shift by the latents at each place."""

    def __init__(self, channels: int, *, z_channels: int, num_groups: int, **options):
        self.norm = GroupNorm(channels, eps=EPS, num_groups=num_groups, **options)
        linear = functools.partial(Linear, z_channels, channels, **options)
        self.scale = linear(bias_init=nnx.initializers.ones_init())
        self.shift = linear()

    def __call__(
        self, x: Float[Array, "b f h w c"], z: Float[Array, "b t y x z"]
    ) -> Float[Array, "b f h w c"]:
        """The latents of the chunk meet its frames at the nearest place, after they were mapped."""
        scale, shift = (repeat_to(layer(z), x.shape) for layer in (self.scale, self.shift))
        return self.norm(x) * scale + shift


def repeat_to(z: Float[Array, "b t y x c"], shape: tuple[int, ...]) -> Float[Array, "b f h w c"]:
    """Nearest neighbours; of an odd number of frames the first is taken for itself."""
    _, f, h, w, _ = shape
    z = jnp.repeat(jnp.repeat(z, h // z.shape[2], axis=2), w // z.shape[3], axis=3)
    if f == 1 or f % 2 == 0:
        return jnp.repeat(z, f // z.shape[1], axis=1)
    count = (f - 1) // (z.shape[1] - 1)
    return jnp.concatenate([z[:, :1], jnp.repeat(z[:, 1:], count, axis=1)], axis=1)


def double_frames(x: Float[Array, "b f h w c"]) -> Float[Array, "b g h w c"]:
    """Every frame twice; of an odd number the first once."""
    if x.shape[1] % 2 == 0:
        return jnp.repeat(x, 2, axis=1)
    return jnp.concatenate([x[:, :1], jnp.repeat(x[:, 1:], 2, axis=1)], axis=1)


def halve_frames(x: Float[Array, "b f h w c"]) -> Float[Array, "b g h w c"]:
    """Means of pairs; of an odd number the first stays."""
    odd = x.shape[1] % 2
    first, rest = x[:, :odd], x[:, odd:]
    b, f, *shape = rest.shape
    return jnp.concatenate([first, rest.reshape(b, f // 2, 2, *shape).mean(axis=2)], axis=1)


class ResnetBlock3D(nnx.Module):
    """Two normalized causal convolutions beside a skip connection."""

    def __init__(
        self, in_channels: int, out_channels: int, *, norm: Callable[[int], Any], **options
    ):
        self.norm1 = norm(in_channels)
        self.conv1 = _conv(in_channels, out_channels, **options)
        self.norm2 = norm(out_channels)
        self.conv2 = _conv(out_channels, out_channels, **options)
        linear = functools.partial(Linear, kernel_init=fan_in_uniform, **options)
        self.shortcut = linear(in_channels, out_channels) if in_channels != out_channels else None

    def __call__(
        self, x: Float[Array, "b f h w c"], past: Past, *z: Array
    ) -> Float[Array, "b f h w o"]:
        """`z` is what the norms take beside `x`: the latents in the decoder."""
        h = self.conv1(nnx.silu(self.norm1(x, *z)), past)
        h = self.conv2(nnx.silu(self.norm2(h, *z)), past)
        return (x if self.shortcut is None else self.shortcut(x)) + h


class Level3D(nnx.Module):
    """One resolution: residual blocks, then resampling in space."""

    def __init__(self, blocks: list[ResnetBlock3D], resample: nnx.Module | None):
        self.blocks, self.resample = nnx.List(blocks), resample


def _conv(in_features: int, out_features: int, **options) -> CausalConv:
    return CausalConv(in_features, out_features, kernel_init=fan_in_uniform, **options)


class Encoder3D(nnx.Module):
    """Whole videos, or chunks of them, to the unclamped moments of their latents."""

    def __init__(self, cfg: AutoencoderCausal3DConfig, **options):
        norm = functools.partial(GroupNorm, eps=EPS, num_groups=cfg.num_groups, **options)
        block = functools.partial(ResnetBlock3D, norm=norm, **options)
        self.cfg = cfg
        self.conv_in = _conv(3, cfg.channels, **options)
        width, levels, last = cfg.channels, [], len(cfg.encoder_mult) - 1
        for i, mult in enumerate(cfg.encoder_mult):
            out = mult * cfg.channels
            blocks = [block(out if j else width, out) for j in range(cfg.encoder_blocks)]
            levels.append(
                Level3D(blocks, Downsample(out, padding=(0, 1), **options) if i < last else None)
            )
            width = out
        self.levels = nnx.List(levels)
        self.middle = nnx.List([block(width, width) for _ in range(2)])
        self.norm_out = norm(width)
        self.conv_out = _conv(width, 2 * cfg.z_channels, **options)

    def __call__(
        self, x: Float[Array, "b f h w 3"], cache: Cache | None = None
    ) -> tuple[Float[Array, "b t y x z2"], Cache]:
        """Moments, and the cache for the chunk behind this one; without a cache it is the first."""
        past = Past(cache)
        x = self.conv_in(x, past)
        for i, level in enumerate(self.levels):
            for block in level.blocks:
                x = block(x, past)
            if level.resample is not None:
                x = level.resample(halve_frames(x) if i < self.cfg.time_levels else x)
        for block in self.middle:
            x = block(x, past)
        return self.conv_out(nnx.silu(self.norm_out(x)), past), past.left


class Decoder3D(nnx.Module):
    """A chunk of latents to frames; `levels[0]` is the finest, they run from the last down."""

    def __init__(self, cfg: AutoencoderCausal3DConfig, **options):
        norm = functools.partial(
            SpatialNorm, z_channels=cfg.z_channels, num_groups=cfg.num_groups, **options
        )
        block = functools.partial(ResnetBlock3D, norm=norm, **options)
        self.cfg = cfg
        width, levels = cfg.decoder_mult[-1] * cfg.channels, []
        self.conv_in = _conv(cfg.z_channels, width, **options)
        self.middle = nnx.List([block(width, width) for _ in range(2)])
        for i, mult in reversed(list(enumerate(cfg.decoder_mult))):
            out = mult * cfg.channels
            blocks = [block(out if j else width, out) for j in range(cfg.decoder_blocks)]
            levels.append(Level3D(blocks, Upsample(out, **options) if i else None))
            width = out
        self.levels = nnx.List(levels[::-1])
        self.norm_out = norm(width)
        self.conv_out = _conv(width, 3, **options)

    def __call__(
        self, z: Float[Array, "b t y x z"], cache: Cache | None = None
    ) -> tuple[Float[Array, "b f h w 3"], Cache]:
        """Frames, and the cache for the chunk behind this one; without a cache it is the first."""
        past = Past(cache)
        x = self.conv_in(z, past)
        for block in self.middle:
            x = block(x, past, z)
        first = len(self.levels) - self.cfg.time_levels
        for i, level in reversed(list(enumerate(self.levels))):
            for block in level.blocks:
                x = block(x, past, z)
            if level.resample is not None:
                x = level.resample(double_frames(x) if i >= first else x)
        return self.conv_out(nnx.silu(self.norm_out(x, z)), past), past.left


def run_in_chunks(
    run: Callable[..., tuple[Array, Cache]], x: Array, size: int, cache: Cache | None = None
) -> tuple[Array, Cache]:
    """Of the first `size + 1` frames (or of the only one), then of `size` after `size`.

    Args:
      run: `Encoder3D.__call__` or `Decoder3D.__call__`.
      x: `[b, f, ...]`, of a whole number of chunks.
      size: Frames of a chunk; of latents, where they are decoded.
      cache: Of what is in front of `x`, which has no frame beside its chunks then.

    Returns:
      What it makes of the chunks, one behind the other, and the cache for what follows.
    """
    made = []
    if cache is None:
        first, cache = run(x[:, : size + 1])
        made, x = [first], x[:, size + 1 :]
    if x.shape[1] == size:  # no loop for one chunk: inside of one, convolutions crawl on CPUs
        later, cache = run(x, cache)
        made.append(later)
    elif x.shape[1]:
        chunks = rearrange(x, "b (n s) ... -> n b s ...", s=size)

        def step(cache, chunk):
            made, cache = run(chunk, cache)
            return cache, made

        cache, later = jax.lax.scan(step, cache, chunks)
        made.append(rearrange(later, "n b f ... -> b (n f) ..."))
    return jnp.concatenate(made, axis=1), cache


def decode_in_chunks(
    decode: Callable[..., tuple[Array, Cache]],
    z: Float[Array, "b t y x z"],
    cache: Cache | None = None,
) -> tuple[Float[Array, "b f h w 3"], Cache]:
    """Frames of the first three latents (or of the only one), then of two after two.

    Args:
      decode: `Decoder3D.__call__`.
      z: Unscaled latents.
      cache: Of the latents in front of these, which are then pairs from the first one on.

    Returns:
      The frames, and the cache for the latents behind.

    Raises:
      ValueError: There is an even number of latents, or an odd one behind a cache.
    """
    is_first = cache is None
    if z.shape[1] % 2 != is_first or not z.shape[1]:
        raise ValueError(
            f"latents are decoded in pairs{' behind the first one' * is_first}, so their number "
            f"must be {'odd' if is_first else 'even'}, got {z.shape[1]}"
        )
    return run_in_chunks(decode, z, 2, cache)


class AutoencoderCausal3D(nnx.Module):
    """Videos [b, f, h, w, 3] to latents [b, t, y, x, z], and back; decoding needs no encoder."""

    def __init__(
        self,
        cfg: AutoencoderCausal3DConfig,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.cfg, self.dtype = cfg, dtype
        self.encoder = Encoder3D(cfg, **options)
        self.decoder = Decoder3D(cfg, **options)

    @typechecked
    def moments(
        self, video: Float[Array, "b f h w 3"], *, in_chunks: bool = False
    ) -> Float[Array, "b t y x z2"]:
        """Mean and unclamped log-variance of the posterior, side by side on the last axis.

        Args:
          in_chunks: Of as many frames as are decoded at a time: 9, then 8 after 8 in the release.

        Raises:
          ValueError: The frames are of no fitting number or size.
        """
        count = self.cfg.num_decodable if in_chunks else self.cfg.num_latents
        count(video.shape[1])
        step = self.cfg.downsampling
        if video.shape[2] % step or video.shape[3] % step:
            raise ValueError(
                f"frame sides must be multiples of {step}, got {video.shape[2]}x{video.shape[3]}: "
                "resize or crop first"
            )
        x = video.astype(self.dtype or video.dtype)
        if not in_chunks:
            return self.encoder(x)[0]
        return run_in_chunks(self.encoder, x, 2 * self.cfg.time_factor)[0]

    def encode(
        self, video: Float[Array, "b f h w 3"], *, in_chunks: bool = False
    ) -> DiagonalGaussian:
        """Posterior of the unscaled latents of a whole video; `in_chunks` as of `moments`."""
        return DiagonalGaussian.from_moments(self.moments(video, in_chunks=in_chunks))

    def encode_latents(
        self,
        video: Float[Array, "b f h w 3"],
        key: Array | None = None,
        *,
        in_chunks: bool = False,
    ) -> Float[Array, "b t y x z"]:
        """Scaled latents, float32: a posterior sample, or the mean without a key."""
        posterior = self.encode(video, in_chunks=in_chunks)
        z = posterior.mode() if key is None else posterior.sample(key)
        return self.cfg.scale_factor * z

    @typechecked
    def decode_chunk(
        self, z: Float[Array, "b t y x z"], cache: Cache | None = None
    ) -> tuple[Float[Array, "b f h w 3"], Cache]:
        """Frames of a chunk, not clipped, and the cache for the next one.

        Args:
          z: Unscaled latents. The first chunk has one or three, each later one two.
          cache: Of the chunk before.

        Raises:
          ValueError: The latents have other channels than the config says.
        """
        if z.shape[-1] != self.cfg.z_channels:
            raise ValueError(
                f"latents must have {self.cfg.z_channels} channels (last), got {z.shape[-1]}"
            )
        return self.decoder(z.astype(self.dtype or z.dtype), cache)

    def decode(self, z: Float[Array, "b t y x z"]) -> Float[Array, "b f h w 3"]:
        """Frames of unscaled latents, not clipped; see `decode_in_chunks`."""
        return decode_in_chunks(self.decode_chunk, z)[0]

    def decode_latents(self, latents: Float[Array, "b t y x z"]) -> Float[Array, "b f h w 3"]:
        """Frames of scaled latents, not clipped to [-1, 1]."""
        return self.decode(latents / self.cfg.scale_factor)

    def decode_more(
        self, latents: Float[Array, "b t y x z"], cache: Cache | None = None
    ) -> tuple[Float[Array, "b f h w 3"], Cache]:
        """The same piece by piece: the frames, and the cache for the next piece.

        Args:
          latents: Scaled; an odd number of the first piece, an even one of each later.
          cache: Of the piece before.
        """
        return decode_in_chunks(self.decode_chunk, latents / self.cfg.scale_factor, cache)
