"""GPT-2 as a body without a head: embeddings in, hidden states out.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): pre-norm blocks,
learned positions, tanh GELU, a norm at the end. What is predicted from the hidden states is the
caller's business; `logits` is the usual tied head over the vocabulary.
"""

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.nn.activations import tanh_gelu
from dicode_jax.nn.causal_body import CausalBody
from dicode_jax.nn.layer_stack import make_blocks
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.norm import layer_norm
from dicode_jax.nn.remat import Remat
from dicode_jax.nn.transformer import MLP, Attention, Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Sizes of a GPT-2; the defaults are the small model with its own vocabulary.

    Attributes:
      kind: Tells a stored configuration from those of other bodies.
      num_layers: Number of blocks.
      num_heads: Attention heads of a block; must divide `embed_dim`.
      embed_dim: Model width.
      max_seq_len: Rows of the position table: the longest sequence.
      vocab_size: Rows of the token table.
      mlp_dim: Width inside the feed-forward part, `4 * embed_dim` when None.
      dropout: Rate after the embeddings and before each residual sum. Only acts in calls with
        `deterministic=False`.
      attention_dropout: Rate on attention weights, `dropout` when None. Fused attention needs 0.
      layer_norm_eps: Epsilon of every norm.
      scan_layers: Keep the blocks' parameters stacked on a leading axis and `lax.scan` over them:
        the program stays small for deep models. On CPU a loop runs faster.
      remat: What of each block the backward pass computes again: `none` (or False), `full` (or
        True), or a policy between, see `nn.remat`.

    Raises:
      ValueError: A size is not positive, or `num_heads` does not divide `embed_dim`.
    """

    kind: Literal["gpt2"] = "gpt2"
    num_layers: int = 12
    num_heads: int = 12
    embed_dim: int = 768
    max_seq_len: int = 1024
    vocab_size: int = 50257
    mlp_dim: int | None = None
    dropout: float = 0.0
    attention_dropout: float | None = None
    layer_norm_eps: float = 1e-5
    scan_layers: bool = False
    remat: Remat = False

    def __post_init__(self):
        for name in ("num_layers", "num_heads", "embed_dim", "max_seq_len", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        check_counts(self, num_layers=1000)
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must divide embed_dim ({self.embed_dim})"
            )
        for name in ("dropout", "attention_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise ValueError(f"{name} must be in [0, 1), got {rate}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads


def make_block(cfg: GPT2Config, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs) -> Block:
    """A block with one layer for queries, keys and values, and small layers before each sum."""
    kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    inner = {
        "dropout": cfg.dropout,
        "linear": _linear(0.02, **kwargs),
        "last": _linear(0.02 / (2 * cfg.num_layers) ** 0.5, **kwargs),
    }
    d, h = cfg.embed_dim, cfg.num_heads
    mlp_dim = cfg.mlp_dim or 4 * d
    heads = {"num_heads": h, "head_dim": cfg.head_dim, "weights_dropout": cfg.attention_dropout}
    return Block(
        lambda: layer_norm(d, eps=cfg.layer_norm_eps, **kwargs),
        lambda: Attention(d, packed=True, **heads, **inner),
        lambda: MLP(d, mlp_dim, activation=tanh_gelu, **inner),
    )


class GPT2(CausalBody):
    """The stack of blocks between the embeddings and the final norm."""

    def __init__(self, cfg: GPT2Config, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype}
        self.cfg, self.dtype = cfg, dtype
        table = functools.partial(  # kept in param_dtype, and so is the residual stream
            nnx.Embed,
            embedding_init=nnx.initializers.normal(0.02),
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.token_embed = table(cfg.vocab_size, cfg.embed_dim)
        self.position_embed = table(cfg.max_seq_len, cfg.embed_dim)
        self.blocks = make_blocks(make_block, cfg, rngs=rngs, **kwargs)
        self.final_norm = layer_norm(cfg.embed_dim, eps=cfg.layer_norm_eps, rngs=rngs, **kwargs)

    def place(self, embeds, positions):
        """Adds rows of the position table; there is no rotation."""
        return embeds + self.position_embed(positions).astype(embeds.dtype), None


def _linear(std: float, **kwargs):
    return functools.partial(Linear, kernel_init=nnx.initializers.normal(std), **kwargs)
