"""Perceiver resampler: a few learned queries read a sequence of image features into deep tokens.

DynamiCrafter's `Resampler` and `ImageProjModel` (after IP-Adapter and Flamingo), with the options
of DiCoDe that released weights use.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.nn.activations import gelu
from dicode_jax.nn.attention import attend
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.norm import layer_norm
from dicode_jax.typing import Array, Float, typechecked


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """Sizes and options of a `Resampler`; the defaults are those of the released DiCoDe.

    Attributes:
        dim: width of the queries inside the resampler.
        depth: number of (attention, feed-forward) layers.
        head_dim, num_heads: attention heads; `num_heads * head_dim` may differ from `dim`.
        num_queries: output tokens per image (per frame when `video_length` is set).
        embed_dim: width of the input features.
        output_dim: width of the output tokens.
        ff_mult: feed-forward width over `dim`.
        video_length: frames that one image is expanded to, frame-major; None for one.
        use_norm_out: end with a layer norm.
        output_shape: `(h, w, c)` of an image that tokens fill by patches, in place of tokens.
    """

    dim: int = 1024
    depth: int = 4
    head_dim: int = 64
    num_heads: int = 12
    num_queries: int = 16
    embed_dim: int = 1280
    output_dim: int = 1024
    ff_mult: float = 4
    video_length: int | None = None
    use_norm_out: bool = True
    output_shape: tuple[int, int, int] | None = None

    RETIRED: ClassVar = {
        "use_cosine": (False, "use_norm_out"),
        "extra_self_attn": (False, "a larger depth"),
        "self_attn_over_batch": (False, "a larger depth"),
        "extra_output_proj": (False, "the projection to output_dim"),
    }

    def __post_init__(self):
        for name in (
            "dim",
            "depth",
            "head_dim",
            "num_heads",
            "num_queries",
            "embed_dim",
            "output_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_counts(self, depth=1000)
        if self.video_length is not None and self.video_length < 1:
            raise ValueError(f"video_length must be at least 1 or None, got {self.video_length}")
        if int(self.dim * self.ff_mult) < 1:
            raise ValueError(f"ff_mult must be positive, got {self.ff_mult}")
        if self.output_shape is not None:
            self._check_output_shape(self.output_shape)

    def _check_output_shape(self, shape: tuple[int, ...]):
        if len(shape) != 3:
            raise ValueError(f"output_shape must be (h, w, c), got {shape}")
        grid = math.isqrt(self.num_tokens)
        if grid * grid != self.num_tokens:
            raise ValueError(f"output_shape needs a square number of tokens, got {self.num_tokens}")
        h, w, _ = shape
        if h % grid or w % grid:
            raise ValueError(
                f"output_shape {self.output_shape} does not divide into {grid} x {grid} patches"
            )

    @property
    def num_tokens(self) -> int:
        """Number of output tokens: queries times `video_length`."""
        return self.num_queries * (self.video_length or 1)

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the patch that one token fills when `output_shape` is set."""
        assert self.output_shape is not None, "tokens of no patches"
        grid = math.isqrt(self.num_tokens)
        h, w, c = self.output_shape
        return h // grid, w // grid, c


class PerceiverAttention(nnx.Module):
    """Queries attend to [features ; queries], both normalised, one joint key/value projection."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = functools.partial(Linear, use_bias=False, **options)
        inner_dim = num_heads * head_dim
        self.head_dim = head_dim
        self.norm_features, self.norm_latents = (layer_norm(dim, **options) for _ in range(2))
        self.to_q, self.to_kv = linear(dim, inner_dim), linear(dim, 2 * inner_dim)
        self.to_out = linear(inner_dim, dim)

    def __call__(
        self, features: Float[Array, "b l d"], latents: Float[Array, "b n d"]
    ) -> Float[Array, "b n d"]:
        features, latents = self.norm_features(features), self.norm_latents(latents)
        keys_values = self.to_kv(jnp.concatenate([features, latents], axis=1))
        k, v = jnp.split(keys_values, 2, axis=-1)
        return self.to_out(attend(self.to_q(latents), k, v, head_dim=self.head_dim))


class FeedForward(nnx.Module):
    """Two-layer feed-forward part, exact GELU, no biases; its norm lies inside on disk."""

    def __init__(self, dim: int, mlp_dim: int, **options):
        linear = functools.partial(Linear, use_bias=False, **options)
        self.norm = layer_norm(dim, **options)
        self.up, self.down = linear(dim, mlp_dim), linear(mlp_dim, dim)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.down(gelu(self.up(self.norm(x))))


class ResamplerBlock(nnx.Module):
    """Attention to the features, then feed-forward; each with a residual."""

    def __init__(
        self, cfg: ResamplerConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attn = PerceiverAttention(cfg.dim, cfg.num_heads, cfg.head_dim, **kwargs)
        self.ff = FeedForward(cfg.dim, int(cfg.dim * cfg.ff_mult), **kwargs)

    def __call__(
        self, features: Float[Array, "b l d"], latents: Float[Array, "b n d"]
    ) -> Float[Array, "b n d"]:
        latents = latents + self.attn(features, latents)
        return latents + self.ff(latents)


class Resampler(nnx.Module):
    """Features [b, l, e] -> deep tokens [b, n, z], or an image [b, h, w, c] with `output_shape`."""

    def __init__(
        self, cfg: ResamplerConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.cfg = cfg
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = functools.partial(Linear, **options)
        draw = jax.random.normal(rngs.params(), (cfg.num_tokens, cfg.dim), param_dtype)
        self.latents = nnx.Param(draw / cfg.dim**0.5)
        self.proj_in = linear(cfg.embed_dim, cfg.dim)
        self.blocks = nnx.List([ResamplerBlock(cfg, **options) for _ in range(cfg.depth)])
        self.proj_out = linear(cfg.dim, cfg.output_dim)
        if cfg.use_norm_out:
            self.norm_out = layer_norm(cfg.output_dim, **options)
        if cfg.output_shape is not None:
            self.final_proj = linear(cfg.output_dim, math.prod(cfg.patch_shape))

    @typechecked
    def __call__(self, x: Float[Array, "b l e"]) -> Float[Array, "b ..."]:
        """Reads features into tokens.

        Args:
            x: features [b, l, e], any length; e is `cfg.embed_dim`.

        Returns:
            [b, n, z], or [b, h, w, c] when `cfg.output_shape` is set.

        Raises:
            ValueError: the feature width is not `cfg.embed_dim`.
        """
        cfg = self.cfg
        if x.shape[-1] != cfg.embed_dim:
            raise ValueError(
                f"the resampler takes features of width {cfg.embed_dim}, got shape {x.shape}"
            )
        features = self.proj_in(x)
        latents = jnp.broadcast_to(
            self.latents[...].astype(features.dtype), (x.shape[0], cfg.num_tokens, cfg.dim)
        )
        for block in self.blocks:
            latents = block(features, latents)
        tokens = self.proj_out(latents)
        if cfg.use_norm_out:
            tokens = self.norm_out(tokens)
        if cfg.output_shape is not None:
            tokens = self._to_image(self.final_proj(tokens))
        return tokens

    def _to_image(self, tokens: Float[Array, "b n p"]) -> Float[Array, "b h w c"]:
        ph, pw, c = self.cfg.patch_shape
        grid = math.isqrt(self.cfg.num_tokens)
        layout = "b (y x) (c h w) -> b (y h) (x w) c"  # a token holds its patch channel-first
        return rearrange(tokens, layout, y=grid, x=grid, c=c, h=ph, w=pw)


class LinearImageProjection(nnx.Module):
    """One pooled image vector [b, e] -> `num_tokens` normalised tokens [b, n, z] by one linear map.

    DynamiCrafter's `ImageProjModel`.
    """

    def __init__(
        self,
        embed_dim: int,
        output_dim: int,
        num_tokens: int = 4,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_tokens, self.output_dim = num_tokens, output_dim
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.proj = Linear(embed_dim, num_tokens * output_dim, **options)
        self.norm = layer_norm(output_dim, **options)

    @typechecked
    def __call__(self, x: Float[Array, "b e"]) -> Float[Array, "b n z"]:
        return self.norm(rearrange(self.proj(x), "b (n z) -> b n z", n=self.num_tokens))
