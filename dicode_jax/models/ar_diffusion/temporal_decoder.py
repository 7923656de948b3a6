"""Attention over frames between the layers of AR-Diffusion's decoder (its `TiTok_KL_wT`).

Before each layer the patches of a place look at those of the same place in frames before (fine),
and then all positions of a frame at the tokens of its own and of earlier frames (coarse). Both end
in a linear layer that starts at zero, so that an untrained one decodes frame by frame; the
original overwrites that start by mistake. Letters as in `models.query_tokenizer`; b videos, f
frames.
"""

import functools
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.models.query_tokenizer import INIT, QueryTransformerConfig
from dicode_jax.nn.attention import attend
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.norm import layer_norm
from dicode_jax.nn.transformer import Attention
from dicode_jax.typing import Array, Bool, Float


def frame_mask(num_frames: int, queries: int, keys: int) -> Bool[Array, "1 1 t s"]:
    """Positions of a frame see those of their own and earlier frames.

    Args:
      queries, keys: Positions per frame.
    """
    frames = jnp.arange(num_frames)
    return (frames.repeat(queries)[:, None] >= frames.repeat(keys)[None])[None, None]


class FineTemporal(nnx.Module):
    """`x + attention(norm(x))` over the frames of each place, causal."""

    def __init__(self, cfg: QueryTransformerConfig, **options):
        linear = functools.partial(Linear, kernel_init=INIT, **options)
        last = functools.partial(Linear, kernel_init=nnx.initializers.zeros_init(), **options)
        self.norm = layer_norm(cfg.embed_dim, **options)
        self.attn = Attention(
            cfg.embed_dim,
            num_heads=cfg.num_heads,
            head_dim=cfg.head_dim,
            packed=True,
            linear=linear,
            last=last,
        )

    def __call__(self, x: Float[Array, "b f t d"]) -> Float[Array, "b f t d"]:
        flat = rearrange(x, "b f t d -> (b t) f d")
        y, _ = self.attn(self.norm(flat), causal=True)
        return x + rearrange(y, "(b t) f d -> b f t d", b=len(x))


class CoarseTemporal(nnx.Module):
    """All positions of a frame look at the tokens of frames up to their own."""

    def __init__(self, cfg: QueryTransformerConfig, **options):
        dim, self.head_dim = cfg.embed_dim, cfg.head_dim
        linear = functools.partial(Linear, dim, **options)
        self.norm_q, self.norm_k, self.norm_v = (layer_norm(dim, **options) for _ in range(3))
        self.qkv: Any = linear(3 * dim, kernel_init=INIT)
        self.out = linear(dim, kernel_init=nnx.initializers.zeros_init())

    def __call__(
        self, x: Float[Array, "b f t d"], tokens: Float[Array, "b f l d"]
    ) -> Float[Array, "b f t d"]:
        (_, f, t, _), latents = x.shape, tokens.shape[2]
        inputs = self.norm_q(x), self.norm_k(tokens), self.norm_v(tokens)
        # One layer on disk, of which each input meets its own third.
        kernels = jnp.split(self.qkv.kernel[...], 3, axis=1)
        biases = jnp.split(self.qkv.bias[...], 3)
        query, key, value = (
            rearrange(y, "b f t d -> b (f t) d") @ w.astype(y.dtype) + c.astype(y.dtype)
            for y, w, c in zip(inputs, kernels, biases, strict=True)
        )
        mask = frame_mask(f, t, latents)
        y = attend(query, key, value, head_dim=self.head_dim, mask=mask)
        return x + rearrange(self.out(y), "b (f t) d -> b f t d", f=f)


class TemporalMix(nnx.Module):
    """Fine and coarse attention before each layer of a decoder."""

    def __init__(self, cfg: QueryTransformerConfig, **options):
        layers = range(cfg.num_layers)
        self.fine = nnx.List([FineTemporal(cfg, **options) for _ in layers])
        self.coarse = nnx.List([CoarseTemporal(cfg, **options) for _ in layers])

    def __call__(
        self, layer: int, x: Float[Array, "n t d"], *, num_frames: int, num_tokens: int
    ) -> Float[Array, "n t d"]:
        """Positions of `n / num_frames` videos: class, patches, `num_tokens` tokens."""
        x = rearrange(x, "(b f) t d -> b f t d", f=num_frames)
        first, patches, tokens = x[:, :, :1], x[:, :, 1:-num_tokens], x[:, :, -num_tokens:]
        patches = self.fine[layer](patches)
        x = self.coarse[layer](jnp.concatenate([patches, tokens], axis=2), tokens)
        return rearrange(jnp.concatenate([first, x], axis=2), "b f t d -> (b f) t d")
