"""Perceiver resampler: a few learned queries read a sequence of image features into deep tokens.

DynamiCrafter's `Resampler` and `ImageProjModel` (after IP-Adapter and Flamingo), with the options
of DiCoDe. Deviation: the original's extra self-attention attends over the batch axis by mistake.
Here it attends over tokens unless `self_attn_over_batch` asks for the original behaviour.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.nn.activations import gelu
from dicode_jax.nn.attention import dot_product_attention
from dicode_jax.nn.linear import Linear
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
        video_length: frames that one image is expanded to; the output then has
            `video_length * num_queries` tokens, frame-major (upstream DynamiCrafter). None for one.
        use_norm_out: end with a layer norm.
        use_cosine: scale every output token to unit length.
        extra_self_attn: a residual self-attention among the queries before each layer, with
            `dim // head_dim` heads.
        self_attn_over_batch: run that self-attention over the batch axis, as the original does; an
            output then depends on the other samples of the batch. Only for converted checkpoints.
        extra_output_proj: a final linear map of width `output_dim`, the identity at initialisation.
        output_shape: `(h, w, c)`: map the tokens to an image instead, each token filling one patch
            of a square grid.
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
    use_cosine: bool = False
    extra_self_attn: bool = False
    self_attn_over_batch: bool = False
    extra_output_proj: bool = False
    output_shape: tuple[int, int, int] | None = None

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
        if self.video_length is not None and self.video_length < 1:
            raise ValueError(f"video_length must be at least 1 or None, got {self.video_length}")
        if int(self.dim * self.ff_mult) < 1:
            raise ValueError(f"ff_mult must be positive, got {self.ff_mult}")
        if self.extra_self_attn and self.dim % self.head_dim:
            raise ValueError(
                "extra_self_attn needs dim divisible by head_dim, "
                f"got {self.dim} and {self.head_dim}"
            )
        if self.self_attn_over_batch and not self.extra_self_attn:
            raise ValueError("self_attn_over_batch has no meaning without extra_self_attn")
        if self.output_shape is not None:
            self._check_output_shape()

    def _check_output_shape(self):
        if self.extra_output_proj:
            raise ValueError("output_shape and extra_output_proj exclude each other: choose one")
        if len(self.output_shape) != 3:
            raise ValueError(f"output_shape must be (h, w, c), got {self.output_shape}")
        grid = math.isqrt(self.num_tokens)
        if grid * grid != self.num_tokens:
            raise ValueError(f"output_shape needs a square number of tokens, got {self.num_tokens}")
        h, w, _ = self.output_shape
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
        grid = math.isqrt(self.num_tokens)
        h, w, c = self.output_shape
        return h // grid, w // grid, c


def _linear(dtype, param_dtype, rngs):
    return functools.partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def _layer_norm(dtype, param_dtype, rngs):
    return functools.partial(
        nnx.LayerNorm,
        epsilon=1e-5,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


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
        linear = functools.partial(_linear(dtype, param_dtype, rngs), use_bias=False)
        norm = _layer_norm(dtype, param_dtype, rngs)
        inner_dim = num_heads * head_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.norm_features, self.norm_latents = norm(dim), norm(dim)
        self.to_q, self.to_kv = linear(dim, inner_dim), linear(dim, 2 * inner_dim)
        self.to_out = linear(inner_dim, dim)

    def __call__(
        self, features: Float[Array, "b l d"], latents: Float[Array, "b n d"]
    ) -> Float[Array, "b n d"]:
        features, latents = self.norm_features(features), self.norm_latents(latents)
        q = self.to_q(latents)
        kv = self.to_kv(jnp.concatenate([features, latents], axis=1))
        k, v = jnp.split(kv, 2, axis=-1)
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, self.head_dim) for x in (q, k, v))
        out = dot_product_attention(q, k, v)  # scale head_dim ** -0.5
        return self.to_out(out.reshape(*latents.shape[:2], -1))


class LatentSelfAttention(nnx.Module):
    """Residual pre-norm self-attention among the queries; its output starts at zero."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        over_batch: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        linear = _linear(dtype, param_dtype, rngs)
        self.num_heads, self.over_batch = num_heads, over_batch
        self.norm = _layer_norm(dtype, param_dtype, rngs)(dim)
        self.to_qkv = linear(dim, 3 * dim)
        self.to_out = linear(dim, dim, kernel_init=nnx.initializers.zeros)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        y = self.norm(x)
        if self.over_batch:
            y = jnp.swapaxes(y, 0, 1)
        qkv = self.to_qkv(y).reshape(*y.shape[:2], 3, self.num_heads, -1)
        out = dot_product_attention(*(qkv[:, :, i] for i in range(3)))
        out = self.to_out(out.reshape(y.shape))
        if self.over_batch:
            out = jnp.swapaxes(out, 0, 1)
        return x + out


class FeedForward(nnx.Module):
    """Pre-norm two-layer feed-forward block with exact GELU and no biases."""

    def __init__(
        self, dim: int, mlp_dim: int, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        linear = functools.partial(_linear(dtype, param_dtype, rngs), use_bias=False)
        self.norm = _layer_norm(dtype, param_dtype, rngs)(dim)
        self.up, self.down = linear(dim, mlp_dim), linear(mlp_dim, dim)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.down(gelu(self.up(self.norm(x))))


class ResamplerBlock(nnx.Module):
    """[self-attention,] attention to the features, feed-forward; each with a residual."""

    def __init__(
        self, cfg: ResamplerConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if cfg.extra_self_attn:
            self.self_attn = LatentSelfAttention(
                cfg.dim, cfg.dim // cfg.head_dim, over_batch=cfg.self_attn_over_batch, **kwargs
            )
        self.has_self_attn = cfg.extra_self_attn
        self.attn = PerceiverAttention(cfg.dim, cfg.num_heads, cfg.head_dim, **kwargs)
        self.ff = FeedForward(cfg.dim, int(cfg.dim * cfg.ff_mult), **kwargs)

    def __call__(
        self, features: Float[Array, "b l d"], latents: Float[Array, "b n d"]
    ) -> Float[Array, "b n d"]:
        if self.has_self_attn:
            latents = self.self_attn(latents)
        latents = latents + self.attn(features, latents)
        return latents + self.ff(latents)


class Resampler(nnx.Module):
    """Features [b, l, e] -> deep tokens [b, n, z], or an image [b, h, w, c] with `output_shape`."""

    def __init__(
        self, cfg: ResamplerConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.cfg = cfg
        linear = _linear(dtype, param_dtype, rngs)
        draw = jax.random.normal(rngs.params(), (cfg.num_tokens, cfg.dim), param_dtype)
        self.latents = nnx.Param(draw / cfg.dim**0.5)
        self.proj_in = linear(cfg.embed_dim, cfg.dim)
        self.blocks = nnx.List(
            [
                ResamplerBlock(cfg, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
                for _ in range(cfg.depth)
            ]
        )
        self.proj_out = linear(cfg.dim, cfg.output_dim)
        if cfg.use_norm_out:
            self.norm_out = _layer_norm(dtype, param_dtype, rngs)(cfg.output_dim)
        if cfg.extra_output_proj:
            self.final_proj = linear(cfg.output_dim, cfg.output_dim, kernel_init=_identity)
        elif cfg.output_shape is not None:
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
        if cfg.use_cosine:
            tokens = _unit_length(tokens)
        if cfg.extra_output_proj:
            tokens = self.final_proj(tokens)
        elif cfg.output_shape is not None:
            tokens = self._to_image(self.final_proj(tokens))
        return tokens

    def _to_image(self, tokens: Float[Array, "b n p"]) -> Float[Array, "b h w c"]:
        ph, pw, c = self.cfg.patch_shape
        grid = math.isqrt(self.cfg.num_tokens)
        x = tokens.reshape(-1, grid, grid, c, ph, pw)  # a token holds its patch channel-first
        return x.transpose(0, 1, 4, 2, 5, 3).reshape(-1, grid * ph, grid * pw, c)


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
        self.proj = _linear(dtype, param_dtype, rngs)(embed_dim, num_tokens * output_dim)
        self.norm = _layer_norm(dtype, param_dtype, rngs)(output_dim)

    @typechecked
    def __call__(self, x: Float[Array, "b e"]) -> Float[Array, "b n z"]:
        return self.norm(self.proj(x).reshape(-1, self.num_tokens, self.output_dim))


def _identity(key, shape, dtype=jnp.float32, **_):
    return jnp.eye(*shape, dtype=dtype)


def _unit_length(x):
    x32 = x.astype(jnp.float32)
    # The square root is kept away from 0, where its gradient is infinite.
    norm = jnp.sqrt(jnp.maximum(jnp.sum(x32 * x32, axis=-1, keepdims=True), 1e-24))
    return (x32 / norm).astype(x.dtype)
