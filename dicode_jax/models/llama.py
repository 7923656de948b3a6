"""Llama 3 as a body without a head: embeddings in, hidden states out.

Grattafiori et al., "The Llama 3 Herd of Models" (arXiv 2407.21783), and the 1B and 3B models of
Llama 3.2: pre-norm blocks with RMSNorm, rotary positions with stretched low frequencies, grouped
queries and a gated feed-forward part; no biases and no dropout. Fields of the config make LanDiff's
body (arXiv 2503.04606) of it: tanh-GELU, a last LayerNorm, and rotation of neighbouring channels.
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
from dicode_jax.nn.rotary import RotaryScaling, rotary_frequencies, rotary_tables
from dicode_jax.nn.transformer import MLP, Attention, Block

_ACTIVATIONS = {"silu": nnx.silu, "tanh_gelu": tanh_gelu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of a Llama; the defaults are Llama 3.2 1B with its own vocabulary.

    Attributes:
      kind: Tells a stored configuration from those of other bodies.
      num_layers: Number of blocks.
      num_heads: Query heads of a block.
      num_kv_heads: Heads of keys and values, each shared by `num_heads / num_kv_heads` query heads
        in a row.
      embed_dim: Model width.
      head_dim: Width of a head, even; `embed_dim / num_heads` when None.
      mlp_dim: Width inside the feed-forward part.
      max_seq_len: Longest sequence.
      vocab_size: Rows of the token table.
      norm_eps: Epsilon of every norm.
      rope_theta: Base of the rotary frequencies.
      rope_scaling: Stretch of the low frequencies; None for none.
      rotates_pairs: Rotary positions turn neighbouring channels together, see `nn.rotary`.
      activation: Of the gate in the feed-forward part.
      last_norm: "rms", or "layer": with mean and bias and, like the output matrix behind it, in
        float32 whatever the blocks compute in.
      tie_embeddings: `logits` uses the token table; otherwise there is an output matrix.
      scan_layers: Keep the blocks' parameters stacked on a leading axis and `lax.scan` over them:
        the program stays small for deep models. On CPU a loop runs faster.
      remat: What of each block the backward pass computes again: `none` (or False), `full` (or
        True), or a policy between, see `nn.remat`.

    Raises:
      ValueError: A size is not positive, sizes do not divide each other, or a name is unknown.
    """

    kind: Literal["llama"] = "llama"
    num_layers: int = 16
    num_heads: int = 32
    num_kv_heads: int = 8
    embed_dim: int = 2048
    head_dim: int | None = None
    mlp_dim: int = 8192
    max_seq_len: int = 131_072
    vocab_size: int = 128_256
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RotaryScaling | None = RotaryScaling()
    rotates_pairs: bool = False
    activation: Literal["silu", "tanh_gelu"] = "silu"
    last_norm: Literal["rms", "layer"] = "rms"
    tie_embeddings: bool = True
    scan_layers: bool = False
    remat: Remat = False

    def __post_init__(self):
        sizes = ("num_layers", "num_heads", "num_kv_heads", "embed_dim", "mlp_dim")
        for name in (*sizes, "max_seq_len", "vocab_size", "norm_eps", "rope_theta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        check_counts(self, num_layers=1000)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})"
            )
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must divide embed_dim ({self.embed_dim}) "
                "when head_dim is None"
            )
        if self.width_of_head < 1 or self.width_of_head % 2:
            raise ValueError(f"the width of a head must be even, got {self.width_of_head}")
        for name, known in (("activation", tuple(_ACTIVATIONS)), ("last_norm", ("rms", "layer"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )

    @property
    def width_of_head(self) -> int:
        """`head_dim`, or what follows from the other sizes."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim


def make_block(cfg: LlamaConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs) -> Block:
    """A block with RMSNorm, grouped queries and a gated feed-forward part."""
    kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    linear = functools.partial(_linear, **kwargs)
    return Block(
        lambda: nnx.RMSNorm(cfg.embed_dim, epsilon=cfg.norm_eps, **kwargs),
        lambda: Attention(
            cfg.embed_dim,
            num_heads=cfg.num_heads,
            head_dim=cfg.width_of_head,
            num_kv_heads=cfg.num_kv_heads,
            rotates_pairs=cfg.rotates_pairs,
            linear=linear,
        ),
        lambda: MLP(
            cfg.embed_dim,
            cfg.mlp_dim,
            activation=_ACTIVATIONS[cfg.activation],
            gated=True,
            linear=linear,
        ),
    )


class Llama(CausalBody):
    """The stack of blocks between the embeddings and the final norm."""

    def __init__(self, cfg: LlamaConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype}
        self.cfg, self.dtype = cfg, dtype
        self.token_embed = nnx.Embed(  # kept in param_dtype, and so is the residual stream
            cfg.vocab_size,
            cfg.embed_dim,
            embedding_init=nnx.initializers.normal(0.02),
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.blocks = make_blocks(make_block, cfg, rngs=rngs, **kwargs)
        if cfg.last_norm == "layer":
            kwargs["dtype"] = jnp.float32
            self.final_norm = layer_norm(cfg.embed_dim, eps=cfg.norm_eps, rngs=rngs, **kwargs)
        else:
            self.final_norm = nnx.RMSNorm(cfg.embed_dim, epsilon=cfg.norm_eps, rngs=rngs, **kwargs)
        if not cfg.tie_embeddings:
            self.head = _linear(cfg.embed_dim, cfg.vocab_size, rngs=rngs, **kwargs)

    def place(self, embeds, positions):
        """Leaves the embeddings alone: positions turn queries and keys."""
        cfg = self.cfg
        frequencies = rotary_frequencies(
            cfg.width_of_head, theta=cfg.rope_theta, scaling=cfg.rope_scaling
        )
        return embeds, rotary_tables(positions, frequencies)


def _linear(in_dim: int, out_dim: int, **kwargs) -> Linear:
    return Linear(
        in_dim, out_dim, use_bias=False, kernel_init=nnx.initializers.normal(0.02), **kwargs
    )
