"""From semantic features to what LanDiff's control branch adds to noisy latents.

Two-dimensional, in the release frame by frame (Yin et al., arXiv 2503.04606): the grid is doubled
by moving channels into space. Shape letters: b f frames of videos, p those before them, y x the
grid of features, h w that of latents, c channels.
"""

import dataclasses
import functools

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.models.autoencoder_kl import Level, Middle
from dicode_jax.nn.conv import Conv
from dicode_jax.nn.norm import GroupNorm
from dicode_jax.nn.resnet import ResnetBlock, fan_in_uniform, group_norm_per_image
from dicode_jax.typing import Array, Float, typechecked

EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpsamplerConfig:
    """Sizes; the defaults are those of the release.

    Attributes:
      feature_dim: Width of a semantic feature.
      channels: Width of each level, the finest first; the grid is doubled between two of them.
      num_res_blocks: Residual blocks of a level.
      hidden_dim: Width in front of the last convolution.
      num_groups: Groups of every group norm.
      num_past: Frames before each, whose features are read beside its own. A latent stands for four
        frames, and features are of the last of them: where something was in the others is said by
        what came before. Ours; 0 in the release.
    """

    feature_dim: int = 768
    channels: tuple[int, ...] = (128, 512)
    num_res_blocks: int = 5
    hidden_dim: int = 64
    num_groups: int = 32
    num_past: int = 0

    def __post_init__(self):
        check_counts(self, channels=8, num_res_blocks=100)
        if not 0 <= self.num_past <= 100:
            raise ValueError(f"num_past must be from 0 to 100, got {self.num_past}")
        if not self.channels:
            raise ValueError("channels must have at least one level, got ()")
        for name in ("feature_dim", "num_res_blocks", "hidden_dim", "num_groups", "channels"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if any(width % self.num_groups for width in self.channels) or any(
            width % 4 for width in self.channels[1:]
        ):
            raise ValueError(
                f"channels must be multiples of num_groups ({self.num_groups}), and of 4 where the "
                f"grid is doubled, got {self.channels}"
            )

    @property
    def upsampling(self) -> int:
        """Latents for each feature along height and width."""
        return 2 ** (len(self.channels) - 1)


class ShuffleUpsample(nnx.Module):
    """Doubles height and width by a quarter of the channels each, then a 3x3 convolution."""

    def __init__(self, channels: int, **options):
        self.conv = Conv(channels // 4, channels, **options)

    def __call__(self, x: Float[Array, "*n y x c"]) -> Float[Array, "*n h w c"]:
        x = rearrange(x, "... y x (c p q) -> ... (y p) (x q) c", p=2, q=2)
        return self.conv(x)


class SemanticUpsampler(nnx.Module):
    """Semantic features to latents; zero before training."""

    def __init__(
        self,
        cfg: UpsamplerConfig,
        latent_channels: int,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        conv = functools.partial(Conv, kernel_init=fan_in_uniform, **options)
        grouped = {"num_groups": cfg.num_groups, **options}
        block = functools.partial(ResnetBlock, eps=EPS, **grouped)
        self.cfg, self.dtype = cfg, dtype
        width, levels = cfg.channels[-1], []
        self.conv_in = conv((1 + cfg.num_past) * cfg.feature_dim, width)
        self.middle = Middle(block, width, False)
        for i, out in reversed(list(enumerate(cfg.channels))):
            blocks = [block(out if j else width, out) for j in range(cfg.num_res_blocks)]
            resample = ShuffleUpsample(out, kernel_init=fan_in_uniform, **options) if i else None
            levels.append(Level(blocks, [], resample))
            width = out
        self.levels = nnx.List(levels[::-1])
        self.norm_out = GroupNorm(width, eps=EPS, **grouped)
        self.conv_out = conv(width, cfg.hidden_dim)
        zeros = nnx.initializers.zeros_init()
        self.to_latents = Conv(cfg.hidden_dim, latent_channels, kernel_init=zeros, **options)

    @typechecked
    def __call__(
        self, features: Float[Array, "b f y x c"], past: Float[Array, "b p y x c"] | None = None
    ) -> Float[Array, "b f h w z"]:
        """Latents of features, each frame by itself and the `num_past` before it.

        Args:
          past: Features of the frames before these, see `with_past`.
        """
        return self.to_latents(self.upsampled(features, past))

    def with_past(
        self, features: Float[Array, "b f y x c"], past: Float[Array, "b p y x c"] | None
    ) -> Float[Array, "b p_f y x c"]:
        """Features and the `num_past` frames before them: None for the first frame, repeated."""
        if past is None:
            past = jnp.repeat(features[:, :1], self.cfg.num_past, axis=1)
        return jnp.concatenate([past, features], axis=1)

    def upsampled(
        self, features: Float[Array, "b f y x c"], past: Float[Array, "b p y x c"] | None = None
    ) -> Float[Array, "b f h w d"]:
        """What the last convolution gets."""
        if self.cfg.num_past:
            seen, f = self.with_past(features, past), features.shape[1]
            shifted = [seen[:, i : i + f] for i in range(self.cfg.num_past + 1)]
            features = jnp.concatenate(shifted, axis=-1)
        x = self.middle(self.conv_in(features.astype(self.dtype or features.dtype)))
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(nnx.silu(group_norm_per_image(self.norm_out, x)))
