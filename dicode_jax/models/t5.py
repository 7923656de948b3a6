"""The encoder of T5 v1.1 (and flan-T5): token ids in, one vector per token out.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
(arXiv 1910.10683), with the gated feed-forward part of version 1.1. Blocks are pre-norm with
RMSNorm and have no biases; scores are not scaled. All blocks share one table of relative positions.

Letters: b batch, t positions, h heads, d model width.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.nn.activations import tanh_gelu
from dicode_jax.nn.layer_stack import make_blocks, run_blocks
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.masks import key_mask
from dicode_jax.nn.remat import Remat
from dicode_jax.nn.transformer import MLP, Attention, Block
from dicode_jax.typing import Array, Bool, Float, Int, typechecked


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5EncoderConfig:
    """Sizes of an encoder; the defaults are those of T5 v1.1 XXL and flan-T5 XXL.

    Attributes:
      num_layers: Number of blocks.
      num_heads: Attention heads of a block.
      embed_dim: Model width.
      head_dim: Width of a head; all heads together may be wider or narrower than the model.
      mlp_dim: Width inside the feed-forward part.
      vocab_size: Rows of the token table.
      num_buckets: Rows of the table of relative positions; a multiple of 4.
      max_distance: Distances from here on share one bucket.
      norm_eps: Epsilon of every norm.
      scan_layers: Keep the blocks' parameters stacked on a leading axis and `lax.scan` over them.
      remat: What of each block the backward pass computes again: `none` (or False), `full` (or
        True), or a policy between, see `nn.remat`.

    Raises:
      ValueError: A size is not positive, or `num_buckets` and `max_distance` do not go together.
    """

    num_layers: int = 24
    num_heads: int = 64
    embed_dim: int = 4096
    head_dim: int = 64
    mlp_dim: int = 10_240
    vocab_size: int = 32_128
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    scan_layers: bool = False
    remat: Remat = False

    def __post_init__(self):
        sizes = ("num_layers", "num_heads", "embed_dim", "head_dim", "mlp_dim", "vocab_size")
        for name in (*sizes, "num_buckets", "norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        check_counts(self, num_layers=1000)
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"num_buckets ({self.num_buckets}) must be a multiple of 4 and max_distance "
                f"({self.max_distance}) above a quarter of it"
            )


def relative_buckets(offsets: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Rows of the position table for offsets `key - query`, int32.

    One half of the rows is for keys behind the query, the other for those before it. In each, the
    first half counts single steps and the second grows with the logarithm of the distance.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    distance = np.abs(offsets)
    scale = np.float32(math.log(max_distance / exact))
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / scale
    far = np.minimum(exact + (ratio * (half - exact)).astype(np.int32), half - 1)
    return np.where(offsets > 0, half, 0) + np.where(distance < exact, distance, far)


def make_block(
    cfg: T5EncoderConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
) -> Block:
    """A block with RMSNorm, scores that are not scaled, and a feed-forward part gated by GELU."""
    kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    d, linear = cfg.embed_dim, functools.partial(_linear, **kwargs)
    return Block(
        lambda: nnx.RMSNorm(d, epsilon=cfg.norm_eps, **kwargs),
        lambda: Attention(
            d, num_heads=cfg.num_heads, head_dim=cfg.head_dim, scale=1.0, linear=linear
        ),
        lambda: MLP(d, cfg.mlp_dim, activation=tanh_gelu, gated=True, linear=linear),
    )


class T5Encoder(nnx.Module):
    """Token table, table of relative positions, blocks and the final norm."""

    def __init__(
        self, cfg: T5EncoderConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype}
        self.cfg, self.dtype = cfg, dtype
        init = nnx.initializers.normal(1.0)
        self.token_embed = nnx.Embed(  # kept in param_dtype, and so is the residual stream
            cfg.vocab_size, cfg.embed_dim, embedding_init=init, param_dtype=param_dtype, rngs=rngs
        )
        shape = (cfg.num_buckets, cfg.num_heads)
        init = nnx.initializers.normal(cfg.embed_dim**-0.5)
        self.position_bias = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.blocks = make_blocks(make_block, cfg, rngs=rngs, **kwargs)
        self.final_norm = nnx.RMSNorm(cfg.embed_dim, epsilon=cfg.norm_eps, rngs=rngs, **kwargs)

    def embed_tokens(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Word embeddings."""
        return self.token_embed(ids)

    def bias(self, length: int) -> Float[Array, "1 h t t"]:
        """What is added to the scores of a sequence of this length, float32."""
        places = np.arange(length)
        buckets = relative_buckets(
            places[None] - places[:, None], self.cfg.num_buckets, self.cfg.max_distance
        )
        table = self.position_bias[...].astype(jnp.float32)
        return jnp.moveaxis(table[buckets], -1, 0)[None]

    @typechecked
    def __call__(
        self, embeds: Float[Array, "b t d"], valid: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """Encodes word embeddings.

        Args:
          embeds: Of `embed_tokens`, or whatever stands in their place.
          valid: False at padding, which no token then sees; None for none.

        Returns:
          Vectors after the final norm; those of padding are defined but mean nothing.
        """
        bias = self.bias(embeds.shape[1])
        mask = None if valid is None else key_mask(valid)
        x, _ = run_blocks(
            self.blocks,
            lambda block, x, past, _: block(x, mask, past, bias=bias),
            embeds,
            remat=self.cfg.remat,
        )
        return self.final_norm(x)


def _linear(in_dim: int, out_dim: int, **kwargs) -> Linear:
    init = nnx.initializers.normal(in_dim**-0.5)
    return Linear(in_dim, out_dim, use_bias=False, kernel_init=init, **kwargs)
