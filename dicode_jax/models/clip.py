"""CLIP in OpenCLIP's ViT-H/14 form: an image tower, a text tower, and both with a logit scale.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021),
section 2; modules of `open_clip`. DynamiCrafter and DiCoDe read the image tower before its last
norm (all tokens) and the text tower one block early, so both return tokens and pool in a method of
their own.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.nn.activations import gelu, quick_gelu
from dicode_jax.nn.attention import attend
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.norm import layer_norm
from dicode_jax.nn.transformer import MLP
from dicode_jax.typing import Array, Float, Int, typechecked

Activation = Literal["gelu", "quick_gelu"]


def _check_tower(cfg):
    for name in ("embed_dim", "num_layers", "num_heads"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(cfg, name)}")
    check_counts(cfg, num_layers=1000)
    if cfg.embed_dim % cfg.num_heads:
        raise ValueError(
            f"embed_dim must be divisible by num_heads, got {cfg.embed_dim} and {cfg.num_heads}"
        )
    if cfg.activation not in ("gelu", "quick_gelu"):
        raise ValueError(f"activation must be 'gelu' or 'quick_gelu', got {cfg.activation!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """Sizes of an image tower; the defaults are ViT-H/14.

    Attributes:
        image_size: side of the (square) input image; a multiple of `patch_size`.
        patch_size: side of a patch.
        embed_dim, num_layers, num_heads: the transformer.
        mlp_ratio: feed-forward width over `embed_dim`.
        output_dim: width of the pooled embedding. None builds neither the last norm nor the
            projection, for use of the tokens alone.
        activation: "gelu" (exact) or "quick_gelu" (OpenAI's checkpoints).
    """

    image_size: int = 224
    patch_size: int = 14
    embed_dim: int = 1280
    num_layers: int = 32
    num_heads: int = 16
    mlp_ratio: float = 4.0
    output_dim: int | None = 1024
    activation: Activation = "gelu"

    def __post_init__(self):
        _check_tower(self)
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                "image_size must be a positive multiple of patch_size, "
                f"got {self.image_size} and {self.patch_size}"
            )

    @property
    def num_tokens(self) -> int:
        """Output tokens: one class token and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Sizes of a text tower; the defaults are those beside ViT-H/14.

    Attributes:
        max_seq_len: positions, also the only length accepted by OpenCLIP's own tokenizer.
        vocab_size: token ids; the largest id present in a row marks its end of text.
        embed_dim, num_layers, num_heads: the transformer.
        mlp_ratio: feed-forward width over `embed_dim`.
        output_dim: width of the pooled embedding.
        activation: "gelu" (exact) or "quick_gelu".
    """

    max_seq_len: int = 77
    vocab_size: int = 49408
    embed_dim: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    output_dim: int = 1024
    activation: Activation = "gelu"

    def __post_init__(self):
        _check_tower(self)
        if self.max_seq_len < 1 or self.vocab_size < 1:
            raise ValueError(
                "max_seq_len and vocab_size must be at least 1, "
                f"got {self.max_seq_len} and {self.vocab_size}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Both towers; their `output_dim` must agree."""

    vision: CLIPVisionConfig = CLIPVisionConfig()
    text: CLIPTextConfig = CLIPTextConfig()

    def __post_init__(self):
        if self.vision.output_dim != self.text.output_dim:
            raise ValueError(
                "both towers must project to one width, got output_dim "
                f"{self.vision.output_dim} (vision) and {self.text.output_dim} (text)"
            )


class CLIPAttention(nnx.Module):
    """Multi-head self-attention with one joint q, k, v projection and biases.

    Apart from `nn.transformer.Attention` for the names of its weights on disk.
    """

    def __init__(
        self, dim: int, num_heads: int, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        linear = functools.partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.head_dim = dim // num_heads
        self.to_qkv, self.to_out = linear(dim, 3 * dim), linear(dim, dim)

    def __call__(self, x: Float[Array, "b t d"], mask=None) -> Float[Array, "b t d"]:
        q, k, v = jnp.split(self.to_qkv(x), 3, axis=-1)
        return self.to_out(attend(q, k, v, head_dim=self.head_dim, mask=mask))


class CLIPBlock(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(
        self,
        cfg: CLIPVisionConfig | CLIPTextConfig,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm1 = layer_norm(cfg.embed_dim, **kwargs)
        self.attn = CLIPAttention(cfg.embed_dim, cfg.num_heads, **kwargs)
        self.norm2 = layer_norm(cfg.embed_dim, **kwargs)
        self.mlp = MLP(
            cfg.embed_dim,
            int(cfg.embed_dim * cfg.mlp_ratio),
            activation=gelu if cfg.activation == "gelu" else quick_gelu,
            linear=functools.partial(Linear, **kwargs),
        )

    def __call__(self, x: Float[Array, "b t d"], mask=None) -> Float[Array, "b t d"]:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nnx.Module):
    """Linear embedding of square patches, row-major: a strided convolution run as one product."""

    def __init__(
        self,
        patch_size: int,
        dim: int,
        *,
        use_bias: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.patch_size, self.dtype = patch_size, dtype
        init = nnx.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        shape = (patch_size, patch_size, 3, dim)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), param_dtype)) if use_bias else None

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b t d"]:
        p, dtype = self.patch_size, self.dtype or images.dtype
        layout = "b (y h) (x w) c -> b (y x) (h w c)"
        patches = rearrange(images.astype(dtype), layout, h=p, w=p)
        x = patches @ rearrange(self.kernel[...].astype(dtype), "h w c d -> (h w c) d")
        return x if self.bias is None else x + self.bias[...].astype(dtype)


class CLIPVision(nnx.Module):
    """Image tower: preprocessed images [b, h, w, 3] -> tokens [b, 1 + patches, d]."""

    def __init__(
        self, cfg: CLIPVisionConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.cfg = cfg
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        scale = cfg.embed_dim**-0.5

        def draw(*shape):
            return nnx.Param(scale * jax.random.normal(rngs.params(), shape, param_dtype))

        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.embed_dim, **kwargs)
        self.class_embed = draw(cfg.embed_dim)
        self.pos_embed = draw(cfg.num_tokens, cfg.embed_dim)
        self.norm_pre = layer_norm(cfg.embed_dim, **kwargs)
        self.blocks = nnx.List([CLIPBlock(cfg, **kwargs) for _ in range(cfg.num_layers)])
        if cfg.output_dim is not None:
            self.norm_post = layer_norm(cfg.embed_dim, **kwargs)
            self.proj = Linear(cfg.embed_dim, cfg.output_dim, use_bias=False, **kwargs)

    @typechecked
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b t d"]:
        """All tokens after the last block, before the last norm; the class token comes first.

        Args:
            images: [b, h, w, 3] of side `cfg.image_size`, already normalised.

        Raises:
            ValueError: the images have another size.
        """
        size = self.cfg.image_size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"the image tower takes images [b, {size}, {size}, 3], got {images.shape}: "
                "resize them first (data.transforms.clip_preprocess)"
            )
        x = self.norm_pre(self.embed(images))
        for block in self.blocks:
            x = block(x)
        return x

    def embed(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b t d"]:
        """Class token and patch embeddings with positions, before the first norm."""
        patches = self.patch_embed(images)
        cls = jnp.broadcast_to(
            self.class_embed[...].astype(patches.dtype), (len(patches), 1, patches.shape[-1])
        )
        return jnp.concatenate([cls, patches], axis=1) + self.pos_embed[...].astype(patches.dtype)

    @typechecked
    def pooled(self, tokens: Float[Array, "b t d"]) -> Float[Array, "b e"]:
        """Image embedding (not normalised) from the tokens that `__call__` returned.

        Raises:
            ValueError: the tower was built with `output_dim=None`.
        """
        if self.cfg.output_dim is None:
            raise ValueError("this image tower has no pooled embedding: set output_dim")
        return self.proj(self.norm_post(tokens[:, 0]))


class CLIPText(nnx.Module):
    """Text tower: token ids [b, t] -> tokens [b, t, d]; causal, padding is not masked."""

    def __init__(self, cfg: CLIPTextConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.cfg, self.dtype = cfg, dtype
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def draw(std, *shape):
            return nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))

        self.token_embed = draw(0.02, cfg.vocab_size, cfg.embed_dim)
        self.pos_embed = draw(0.01, cfg.max_seq_len, cfg.embed_dim)
        self.blocks = nnx.List([CLIPBlock(cfg, **kwargs) for _ in range(cfg.num_layers)])
        self.norm_final = layer_norm(cfg.embed_dim, **kwargs)
        self.proj = Linear(cfg.embed_dim, cfg.output_dim, use_bias=False, **kwargs)

    @typechecked
    def __call__(
        self, ids: Int[Array, "b t"], layer: Literal["penultimate", "last"] = "penultimate"
    ) -> Float[Array, "b t d"]:
        """Normalised tokens of every position.

        Args:
            ids: token ids [b, t], t at most `cfg.max_seq_len`.
            layer: "penultimate" skips the last block (what conditions the diffusion model),
                "last" runs all of them (what `pooled` wants).

        Raises:
            ValueError: too many positions, or an unknown layer.
        """
        if layer not in ("penultimate", "last"):
            raise ValueError(f"layer must be 'penultimate' or 'last', got {layer!r}")
        blocks = list(self.blocks)[: -1 if layer == "penultimate" else None]
        x = self.embed(ids)
        mask = jnp.tril(jnp.ones((ids.shape[1], ids.shape[1]), bool))[None, None]
        for block in blocks:
            x = block(x, mask)
        return self.norm_final(x)

    def embed(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Word embeddings with positions."""
        length = ids.shape[1]
        if length > self.cfg.max_seq_len:
            raise ValueError(
                f"the text tower has {self.cfg.max_seq_len} positions, got {length} ids"
            )
        x = self.token_embed[...][ids] + self.pos_embed[...][:length]
        return x if self.dtype is None else x.astype(self.dtype)

    @typechecked
    def pooled(self, tokens: Float[Array, "b t d"], ids: Int[Array, "b t"]) -> Float[Array, "b e"]:
        """Text embedding (not normalised): the token at the first end of text, projected.

        Args:
            tokens: what `__call__` returned with `layer="last"`.
            ids: the same ids; the largest id of a row is its end of text.
        """
        end = jnp.argmax(ids, axis=-1)
        return self.proj(jnp.take_along_axis(tokens, end[:, None, None], axis=1)[:, 0])


class CLIP(nnx.Module):
    """Both towers and the learned temperature."""

    def __init__(self, cfg: CLIPConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.cfg = cfg
        self.vision = CLIPVision(cfg.vision, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.text = CLIPText(cfg.text, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(math.log(1 / 0.07), param_dtype))

    def encode_image(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b e"]:
        """Unit-length image embeddings of preprocessed images."""
        return _unit_length(self.vision.pooled(self.vision(images)))

    def encode_text(self, ids: Int[Array, "b t"]) -> Float[Array, "b e"]:
        """Unit-length text embeddings of token ids."""
        return _unit_length(self.text.pooled(self.text(ids, layer="last"), ids))

    @typechecked
    def __call__(
        self, images: Float[Array, "b h w 3"], ids: Int[Array, "s t"]
    ) -> Float[Array, "b s"]:
        """Logits of every image against every text: `exp(logit_scale)` times the cosine."""
        cosine = self.encode_image(images) @ self.encode_text(ids).T
        return jnp.exp(self.logit_scale[...].astype(jnp.float32)) * cosine


def _unit_length(x):
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
