"""GPT-2 as a body without a head: embeddings in, hidden states out.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): pre-norm blocks,
learned positions, tanh GELU, a norm at the end. Token embeddings are applied by the caller
(`embed_tokens`), so that other vectors can stand in their place; position embeddings are always
added here. What is predicted from the hidden states is the caller's business; `logits` is the usual
tied head over the vocabulary.

Letters: b batch, t positions computed now, s keys (or cache slots), d model width, v vocabulary.
"""

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from dicode_jax.nn.activations import tanh_gelu
from dicode_jax.nn.dropout import drop
from dicode_jax.nn.kv_cache import KVCache
from dicode_jax.nn.layer_stack import make_blocks, run_blocks
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.masks import causal_mask
from dicode_jax.nn.remat import Remat
from dicode_jax.nn.rngs import next_key, split
from dicode_jax.nn.transformer import MLP, Attention, Block
from dicode_jax.typing import Array, Bool, Float, Int, typechecked


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
      dropout: Rate after the embeddings, on attention weights and before each residual sum. Only
        acts in calls with `deterministic=False`.
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
    layer_norm_eps: float = 1e-5
    scan_layers: bool = False
    remat: Remat = False

    def __post_init__(self):
        for name in ("num_layers", "num_heads", "embed_dim", "max_seq_len", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must divide embed_dim ({self.embed_dim})"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads


def make_block(cfg: GPT2Config, rngs: nnx.Rngs, *, dtype=None, param_dtype=jnp.float32) -> Block:
    """A block with one layer for queries, keys and values, and small layers before each sum."""
    kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    inner = {
        "dropout": cfg.dropout,
        "linear": _linear(0.02, **kwargs),
        "last": _linear(0.02 / (2 * cfg.num_layers) ** 0.5, **kwargs),
    }
    d, h = cfg.embed_dim, cfg.num_heads
    mlp_dim = cfg.mlp_dim or 4 * d
    return Block(
        lambda: _norm(d, cfg.layer_norm_eps, **kwargs),
        lambda: Attention(d, num_heads=h, head_dim=cfg.head_dim, packed=True, **inner),
        lambda: MLP(d, mlp_dim, activation=tanh_gelu, **inner),
    )


class GPT2(nnx.Module):
    """The stack of blocks between the embeddings and the final norm.

    Example:
      `hidden, cache = gpt2(gpt2.embed_tokens(ids), cache=gpt2.init_cache(batch=2, size=40))`
    """

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
        self.blocks = make_blocks(
            lambda rngs: make_block(cfg, rngs, **kwargs),
            cfg.num_layers,
            scan_layers=cfg.scan_layers,
            rngs=rngs,
        )
        self.final_norm = _norm(cfg.embed_dim, cfg.layer_norm_eps, rngs=rngs, **kwargs)

    @property
    def embed_dim(self) -> int:
        """Width of embeddings and hidden states."""
        return self.cfg.embed_dim

    @property
    def max_seq_len(self) -> int:
        """Longest sequence that has positions."""
        return self.cfg.max_seq_len

    def embed_tokens(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Word embeddings, without positions."""
        return self.token_embed(ids)

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Scores over the vocabulary by the tied token table."""
        return self.token_embed.attend(hidden)

    def init_cache(self, *, batch: int, size: int, dtype=None) -> KVCache:
        """An empty cache of `size` slots; `dtype` is the compute type by default."""
        return KVCache.empty(
            num_layers=self.cfg.num_layers,
            batch=batch,
            size=size,
            num_heads=self.cfg.num_heads,
            head_dim=self.cfg.head_dim,
            dtype=dtype or self.dtype or jnp.float32,
            stacked=self.cfg.scan_layers,
        )

    @typechecked
    def __call__(
        self,
        embeds: Float[Array, "b t d"],
        positions: Int[Array, "#b t"] | None = None,
        mask: Bool[Array, "#b 1 t s"] | None = None,
        cache: KVCache | None = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """Runs the blocks.

        Args:
          embeds: Token embeddings, or whatever stands in their place; positions are added here.
          positions: Rows of the position table; they follow the cache (or start at 0) by default.
          mask: True where a query sees a key, used as it is: it must hold causality too. With a
            cache `s` is its number of slots. None is causal over everything so far.
          cache: Past keys and values; new ones are written behind them.
          deterministic: False switches dropout on.
          rngs: With a `dropout` stream, needed when dropout acts.

        Returns:
          Hidden states after the final norm, and the cache (None without one).

        Raises:
          ValueError: The sequence is longer than the position table, the new positions do not fit
            in the cache, or dropout has no `rngs`.
        """
        t = embeds.shape[1]
        if positions is None and t > self.cfg.max_seq_len:
            raise ValueError(
                f"{t} positions, but the model has {self.cfg.max_seq_len} (max_seq_len); "
                "shorten the sequence or slide a window over it"
            )
        length = jnp.zeros((), jnp.int32)
        if cache is not None:
            cache.check_room(t)
            length = cache.length
        if positions is None:
            positions = length + jnp.arange(t)[None]
        if mask is None:
            mask = causal_mask(t, t if cache is None else cache.size, offset=length)
        key = None
        if not deterministic and self.cfg.dropout:
            if rngs is None:
                raise ValueError("dropout acts, so pass rngs=nnx.Rngs(dropout=key)")
            key = next_key(rngs.dropout)
        return self._run(embeds, positions, mask, cache, length, key)

    def _run(self, embeds, positions, mask, cache, length, key):
        keys = None if key is None else split(key, self.cfg.num_layers + 1)
        x = embeds + self.position_embed(positions).astype(embeds.dtype)
        if keys is not None:
            x, keys = drop(x, self.cfg.dropout, keys[0]), keys[1:]
        x, cache = run_blocks(
            self.blocks,
            lambda block, x, past, key: block(x, mask, past, length, key=key),
            x,
            cache=cache,
            keys=keys,
            remat=self.cfg.remat,
        )
        if cache is not None:
            cache = dataclasses.replace(cache, length=length + embeds.shape[1])
        return self.final_norm(x), cache


def _linear(std: float, **kwargs):
    return functools.partial(Linear, kernel_init=nnx.initializers.normal(std), **kwargs)


def _norm(dim: int, eps: float, **kwargs) -> nnx.LayerNorm:
    return nnx.LayerNorm(dim, epsilon=eps, use_fast_variance=False, **kwargs)
