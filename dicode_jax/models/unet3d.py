"""Video UNet with text and image attention: the denoiser of DynamiCrafter and DiCoDe.

A 2-D UNet (Rombach et al., 2022) whose blocks gain temporal convolutions and temporal attention
(DynamiCrafter, Xing et al., 2023). Shape letters: b videos, f frames, h w latent rows and columns,
c channels, l context tokens, d context width, g embeddings per video (f, or 1 for all frames).

Differences from the original that leave the numbers alone: tokens shared by frames are projected
once, not once per frame; context of the text length never reaches the image branch.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import ClassVar

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.nn.conv import Conv
from dicode_jax.nn.embeddings import timestep_embedding
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.norm import GroupNorm
from dicode_jax.nn.remat import Remat, checkpoint
from dicode_jax.nn.resnet import Downsample, Upsample, fan_in_uniform, group_norm_per_image
from dicode_jax.nn.spatiotemporal import (
    CONV_NORM_EPS,
    ZEROS,
    SpatialTransformer,
    TemporalTransformer,
    VideoResnetBlock,
    repeat_rows,
)
from dicode_jax.runtime.sharding import BATCH, constrain
from dicode_jax.typing import Array, Float, Int, typechecked

CONTEXT_RULES = ("per_frame", "length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet3DConfig:
    """Sizes and options of the UNet; the defaults are DiCoDe's, 1,438,843,476 parameters.

    Attributes:
        in_channels: channels of the input, conditioning latents included.
        out_channels: channels of the prediction.
        model_channels: width of the first level; the first of `channel_mult` must be 1.
        channel_mult: width of each level over `model_channels`.
        num_res_blocks: residual blocks per level on the way down (one more on the way up).
        attention_resolutions: downsampling factors (1, 2, ...) of levels with attention.
        head_dim: width of a head; None to fix `num_heads` instead.
        num_heads: heads of every level; None to derive them from `head_dim`.
        transformer_depth: transformer blocks per attention layer.
        context_dim: width of the context; None for the width of the layer that reads it.
        text_context_len: leading context tokens that are text, the rest is for the image branch.
        context_rule: "per_frame": image tokens are cut into a run per frame (DiCoDe); "length":
            only if there are `image_tokens_per_frame` for each, else all see all (DynamiCrafter).
        image_tokens_per_frame: for `context_rule` "length".
        image_cross_attention: has the image branch; without it only text tokens are read.
        learnable_image_scale: scales the image branch by 1 + tanh(alpha).
        temporal_attention: a temporal transformer after every spatial one.
        temporal_length: frames of a training clip, which is what export has a model paint.
        init_attention: a temporal transformer after the first convolution.
        init_attention_heads: its heads, `head_dim` wide whatever the width of the level.
        init_attention_context: that transformer reads the text.
        temporal_conv: temporal convolutions in the residual blocks.
        fs_condition: conditions on frame stride or frames per second.
        default_fs: used when none is given.
        dropout: rate in the residual blocks.
        temporal_dropout: rate in the temporal convolutions.
        num_groups: groups of every group norm; the original has 32.
        remat: what of every block the backward pass computes again, see `nn.remat`; only in calls
            with `deterministic=False`.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (1, 2, 4)
    head_dim: int | None = 64
    num_heads: int | None = None
    transformer_depth: int = 1
    context_dim: int | None = 1024
    text_context_len: int = 77
    context_rule: str = "per_frame"
    image_tokens_per_frame: int = 16
    image_cross_attention: bool = True
    learnable_image_scale: bool = True
    temporal_attention: bool = True
    temporal_length: int | None = 16
    init_attention: bool = True
    init_attention_heads: int = 8
    init_attention_context: bool = False
    temporal_conv: bool = True
    fs_condition: bool = True
    default_fs: int = 3
    dropout: float = 0.1
    temporal_dropout: float = 0.1
    num_groups: int = 32
    remat: Remat = False

    RETIRED: ClassVar = {
        "use_relative_position": (False, "temporal attention without positions"),
        "is_causal": (False, "temporal attention to all frames"),
        "spatial_aware_conv": (False, "temporal_conv, over frames alone,"),
        "conv_resample": (True, "resampling by convolutions"),
        "resblock_updown": (False, "resampling by convolutions"),
        "use_scale_shift_norm": (False, "an embedding that is added"),
    }

    def __post_init__(self):
        check_counts(self, channel_mult=20, num_res_blocks=100, transformer_depth=100)
        if not self.channel_mult or self.channel_mult[0] != 1:
            raise ValueError(f"channel_mult must start with 1, got {self.channel_mult}")
        if self.model_channels < 1 or self.model_channels % self.num_groups:
            raise ValueError(
                f"model_channels ({self.model_channels}) must be a multiple of num_groups "
                f"({self.num_groups})"
            )
        if (self.head_dim is None) == (self.num_heads is None):
            raise ValueError(
                f"set one of head_dim ({self.head_dim}) and num_heads ({self.num_heads}), not both"
            )
        if self.context_rule not in CONTEXT_RULES:
            raise ValueError(
                f"context_rule must be one of {CONTEXT_RULES}, got {self.context_rule!r}"
            )
        if self.init_attention and self.head_dim is None:
            raise ValueError("init_attention needs head_dim: its heads have that width")

    @property
    def num_shallow(self) -> int:
        """First and last stages that run where deep features are taken from an earlier step."""
        return 1

    @property
    def downsampling(self) -> int:
        """Latents per latent of the coarsest level, along height and width."""
        return 2 ** (len(self.channel_mult) - 1)

    def heads(self, channels: int) -> tuple[int, int]:
        """(number, width) of the attention heads of a layer."""
        if self.head_dim is not None:
            return channels // self.head_dim, self.head_dim
        assert self.num_heads is not None  # checked above
        return self.num_heads, channels // self.num_heads


class TimeMLP(nnx.Module):
    """Sinusoidal embedding of a scalar, then two linear layers."""

    def __init__(self, channels: int, embed_dim: int, *, zero_init: bool = False, **options):
        linear = functools.partial(Linear, **options)
        self.channels = channels
        self.dtype = options.get("dtype")
        self.up = linear(channels, embed_dim, kernel_init=fan_in_uniform)
        self.down = linear(embed_dim, embed_dim, kernel_init=ZEROS if zero_init else fan_in_uniform)

    def __call__(self, scalars: Array) -> Array:
        return self.down(nnx.silu(self.up(timestep_embedding(scalars, self.channels))))


class Stage(nnx.Module):
    """Layers between two skip connections: residual, spatial, temporal, resampling."""

    def __init__(self, layers: list[nnx.Module]):
        self.layers = nnx.List(layers)

    def __call__(self, x: Array, embed: Array, context, image_context, **dropout) -> Array:
        for layer in self.layers:
            match layer:
                case VideoResnetBlock():
                    x = layer(x, repeat_rows(embed, len(x) // len(embed)), **dropout)
                case SpatialTransformer():
                    x = layer(x, context, image_context)
                case TemporalTransformer():
                    x = layer(x, context)
                case _:  # a convolution, up- or downsampling of single frames
                    x = layer(x)
        return x


class UNet3D(nnx.Module):
    """Predicts noise, v or x0 for a noisy video of latents."""

    def __init__(self, cfg: UNet3DConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.cfg = cfg
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        conv = functools.partial(Conv, **options)
        make = _Layers(cfg, options)
        embed_dim, width, factor = make.embed_dim, cfg.model_channels, 1
        self.time_embed = TimeMLP(width, embed_dim, **options)
        self.fs_embed = (
            TimeMLP(width, embed_dim, zero_init=True, **options) if cfg.fs_condition else None
        )
        self.init_attention = make.init_attention() if cfg.init_attention else None

        stages = [Stage([conv(cfg.in_channels, width, kernel_init=fan_in_uniform)])]
        skips = [width]
        for level, mult in enumerate(cfg.channel_mult):
            for _ in range(cfg.num_res_blocks):
                layers: list[nnx.Module] = [make.resnet(width, mult * cfg.model_channels)]
                width = mult * cfg.model_channels
                if factor in cfg.attention_resolutions:
                    layers += make.transformers(width)
                stages.append(Stage(layers))
                skips.append(width)
            if level != len(cfg.channel_mult) - 1:
                stages.append(Stage([Downsample(width, **options)]))
                skips.append(width)
                factor *= 2
        self.down_stages = nnx.List(stages)
        self.mid_stage = Stage(
            [make.resnet(width, width), *make.transformers(width), make.resnet(width, width)]
        )
        stages = []
        for level, mult in reversed(list(enumerate(cfg.channel_mult))):
            for i in range(cfg.num_res_blocks + 1):
                layers: list[nnx.Module] = [
                    make.resnet(width + skips.pop(), mult * cfg.model_channels)
                ]
                width = mult * cfg.model_channels
                if factor in cfg.attention_resolutions:
                    layers += make.transformers(width)
                if level and i == cfg.num_res_blocks:
                    layers.append(Upsample(width, **options))
                    factor //= 2
                stages.append(Stage(layers))
        self.up_stages = nnx.List(stages)
        self.norm_out = GroupNorm(width, eps=CONV_NORM_EPS, num_groups=cfg.num_groups, **options)
        self.conv_out = conv(width, cfg.out_channels, kernel_init=ZEROS)

    @typechecked
    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        timesteps: Int[Array, "b ..."] | Float[Array, "b ..."],
        context: Float[Array, "m l d"],
        fs: Int[Array, " b"] | Float[Array, " b"] | None = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "m f h w o"]:
        """Runs the network.

        There may be several rows of context for each video, as guidance has: first one of each, and
        so on. What comes before the context is read is then computed once.

        Args:
            x: noisy latents, with conditioning latents concatenated after them on channels.
            timesteps: diffusion time in 0..999, one per video [b] or one per frame [b, f].
            context: text tokens, then image tokens (see `context_rule`).
            fs: frame stride or frames per second; None for `default_fs`. Not read without
                `fs_condition`.
            deterministic: False turns dropout on, which then needs `rngs` with a "dropout" stream.

        Raises:
            ValueError: a shape does not fit the config; the message has both.
        """
        return self._run(x, timesteps, context, fs, deterministic=deterministic, rngs=rngs)[0]

    @typechecked
    def with_deep(
        self,
        x: Float[Array, "b f h w c"],
        timesteps: Int[Array, "b ..."] | Float[Array, "b ..."],
        context: Float[Array, "m l d"],
        fs: Int[Array, " b"] | Float[Array, " b"] | None = None,
        *,
        deep: Float[Array, "m f y x k"] | None = None,
    ) -> tuple[Float[Array, "m f h w o"], Float[Array, "m f y x k"]]:
        """Runs the network, and gives the features that its last stages read from the deep ones.

        Neighbouring steps of sampling have almost the same (DeepCache, arXiv 2312.00858): given
        those of an earlier step, only the first and the last `num_shallow` stages run.

        Args:
            x, timesteps, context, fs: as for a call.
            deep: features of an earlier step; None computes them.

        Returns:
            The prediction, and the features that it was made with.
        """
        return self._run(x, timesteps, context, fs, deep=deep)

    def _run(self, x, timesteps, context, fs, *, deep=None, deterministic=True, rngs=None):
        self._check(x, timesteps, context)
        embed = self._embed(timesteps, fs, batch=x.shape[0])
        text, image = self._split_context(context, num_frames=x.shape[1])

        def run(stage: Stage, h: Array, embed: Array, text: Array, image, rngs) -> Array:
            h = constrain(h, BATCH)  # or the compiler splits channels, as it finds weights split
            h = stage(h, embed, text, image, deterministic=deterministic, rngs=rngs)
            return constrain(h, BATCH)

        if not deterministic:  # `nnx.remat` holds no parameters from outside of a sampling loop
            run = checkpoint(run, self.cfg.remat, transform=nnx.remat)
        count, h, skips = self.cfg.num_shallow, x, []
        for i, stage in enumerate(self.down_stages if deep is None else self.down_stages[:count]):
            h = run(stage, h, embed, text, image, rngs)
            if i == 0 and self.init_attention is not None:
                if self.init_attention.has_context:
                    h = repeat_rows(h, len(text) // len(h))
                h = self.init_attention(h, text)
            skips.append(h)

        def run_up(stages: Iterable[Stage], h: Array) -> Array:
            for stage in stages:
                skip = skips.pop()
                skip = repeat_rows(skip, len(h) // len(skip))
                h = run(stage, jnp.concatenate([h, skip], -1), embed, text, image, rngs)
            return h

        if deep is None:
            h = run(self.mid_stage, h, embed, text, image, rngs)
            deep = run_up(self.up_stages[:-count], h)
        h = run_up(self.up_stages[-count:], deep)
        h = self.conv_out(nnx.silu(group_norm_per_image(self.norm_out, h))).astype(x.dtype)
        return repeat_rows(h, len(context) // len(h)), deep

    def _embed(self, timesteps: Array, fs: Array | None, batch: int) -> Float[Array, "b g e"]:
        if timesteps.ndim == 1:
            timesteps = timesteps[:, None]  # one embedding serves all frames
        embed = self.time_embed(timesteps)
        if self.fs_embed is not None:
            fs = jnp.full((batch,), self.cfg.default_fs) if fs is None else fs
            embed = embed + self.fs_embed(fs)[:, None]
        return embed

    def _split_context(self, context: Array, num_frames: int) -> tuple[Array, Array | None]:
        """Text tokens [b, l, d] and image tokens, per frame [b f, k, d] or per video [b, k, d]."""
        cfg = self.cfg
        text, image = context[:, : cfg.text_context_len], context[:, cfg.text_context_len :]
        count = image.shape[1]
        if not cfg.image_cross_attention or count == 0:
            return text, None
        per_frame = cfg.context_rule == "per_frame"
        if per_frame and count % num_frames:
            raise ValueError(
                f"context has {count} image tokens after {cfg.text_context_len} text tokens, which "
                f"cannot be shared evenly by {num_frames} frames"
            )
        if per_frame or count == num_frames * cfg.image_tokens_per_frame:
            image = rearrange(image, "b (f k) d -> (b f) k d", f=num_frames)
        return text, image

    def _check(self, x: Array, timesteps: Array, context: Array) -> None:
        cfg, (b, f, h, w, c) = self.cfg, x.shape
        if c != cfg.in_channels:
            raise ValueError(f"x must have in_channels {cfg.in_channels} (last axis), got {c}")
        if h % cfg.downsampling or w % cfg.downsampling:
            raise ValueError(
                f"height and width of x must be multiples of {cfg.downsampling}, got {h}x{w}"
            )
        if timesteps.shape not in ((b,), (b, f)):
            raise ValueError(
                f"timesteps must have shape ({b},) or ({b}, {f}), got {timesteps.shape}"
            )
        if context.shape[0] % b:
            raise ValueError(
                f"context must have batch {b} as x, or a multiple of it, got {context.shape[0]}"
            )
        if cfg.context_dim not in (None, context.shape[-1]):
            raise ValueError(f"context must be {cfg.context_dim} wide, got {context.shape[-1]}")


class _Layers:
    """Builds the layers of one UNet from its config."""

    def __init__(self, cfg: UNet3DConfig, options: dict):
        self.cfg = cfg
        self.embed_dim = 4 * cfg.model_channels
        self.grouped = {"num_groups": cfg.num_groups, **options}

    def resnet(self, in_channels: int, out_channels: int):
        cfg = self.cfg
        return VideoResnetBlock(
            in_channels,
            out_channels,
            embed_dim=self.embed_dim,
            dropout_rate=cfg.dropout,
            temporal_dropout_rate=cfg.temporal_dropout if cfg.temporal_conv else None,
            **self.grouped,
        )

    def transformers(self, channels: int) -> list[nnx.Module]:
        cfg = self.cfg
        num_heads, head_dim = cfg.heads(channels)
        spatial = SpatialTransformer(
            channels,
            num_heads=num_heads,
            head_dim=head_dim,
            depth=cfg.transformer_depth,
            context_dim=cfg.context_dim,
            image_branch=cfg.image_cross_attention,
            learnable_image_scale=cfg.learnable_image_scale,
            **self.grouped,
        )
        if not cfg.temporal_attention:
            return [spatial]
        return [spatial, self._temporal(channels, num_heads, head_dim)]

    def init_attention(self) -> TemporalTransformer:
        cfg = self.cfg
        assert cfg.head_dim is not None  # checked by the config
        context_dim = (
            (cfg.context_dim or cfg.model_channels) if cfg.init_attention_context else None
        )
        return self._temporal(
            cfg.model_channels, cfg.init_attention_heads, cfg.head_dim, context_dim=context_dim
        )

    def _temporal(self, channels: int, num_heads: int, head_dim: int, **kwargs):
        cfg = self.cfg
        return TemporalTransformer(
            channels,
            num_heads=num_heads,
            head_dim=head_dim,
            depth=cfg.transformer_depth,
            **kwargs,
            **self.grouped,
        )
