"""What causal language models share: positions, mask, cache, limits and the stack of blocks.

Letters: b batch, t positions computed now, s keys (or cache slots), d model width, v vocabulary.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dicode_jax.nn.dropout import drop
from dicode_jax.nn.kv_cache import KVCache
from dicode_jax.nn.layer_stack import run_blocks
from dicode_jax.nn.masks import causal_mask
from dicode_jax.nn.rngs import next_key, split
from dicode_jax.typing import Array, Bool, Float, Int, typechecked


class CausalBody(nnx.Module):
    """A language model without a head: embeddings in, hidden states out.

    Token embeddings are applied by the caller (`embed_tokens`), so that other vectors can stand in
    their place. A model makes `token_embed`, `blocks`, `final_norm` and, unless `logits` uses the
    token table, `head`; and it says by `place` how positions enter.

    Example:
      `hidden, cache = body(body.embed_tokens(ids), cache=body.init_cache(batch=2, size=40))`
    """

    # Its `num_layers`, `embed_dim`, `max_seq_len`, `scan_layers`, `remat`, and rates of dropout.
    cfg: Any
    dtype: Any
    token_embed: nnx.Embed
    blocks: nnx.Module
    final_norm: nnx.Module
    head: nnx.Module | None = None

    def place(
        self, embeds: Float[Array, "b t d"], positions: Int[Array, "#b t"]
    ) -> tuple[Float[Array, "b t d"], tuple[Array, Array] | None]:
        """Embeddings with their positions in them, and the tables for rotation if there is one."""
        raise NotImplementedError

    @property
    def embed_dim(self) -> int:
        """Width of embeddings and hidden states."""
        return self.cfg.embed_dim

    @property
    def max_seq_len(self) -> int:
        """Longest sequence."""
        return self.cfg.max_seq_len

    def embed_tokens(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Word embeddings, without positions."""
        return self.token_embed(ids)

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Scores over the vocabulary, by the token table or the output matrix."""
        return self.token_embed.attend(hidden) if self.head is None else self.head(hidden)

    def init_cache(self, *, batch: int, size: int, dtype=None) -> KVCache:
        """An empty cache of `size` slots; `dtype` is the compute type by default."""
        block: Any = self.blocks[0] if isinstance(self.blocks, nnx.List) else self.blocks
        return KVCache.empty(
            num_layers=self.cfg.num_layers,
            batch=batch,
            size=size,
            num_heads=block.attn.num_kv_heads,
            head_dim=block.attn.head_dim,
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
          positions: They follow the cache (or start at 0) by default.
          mask: True where a query sees a key, used as it is: it must hold causality too. With a
            cache `s` is its number of slots. None is causal over everything so far.
          cache: Past keys and values; new ones are written behind them.
          deterministic: False switches dropout on, where the model has it.
          rngs: With a `dropout` stream, needed when dropout acts.

        Returns:
          Hidden states after the final norm, and the cache (None without one).

        Raises:
          ValueError: The sequence is longer than `max_seq_len`, the new positions do not fit in
            the cache, or dropout has no `rngs`.
        """
        t = embeds.shape[1]
        if positions is None and t > self.max_seq_len:
            raise ValueError(
                f"{t} positions, but the model has {self.max_seq_len} (max_seq_len); "
                "shorten the sequence or slide a window over it"
            )
        length = jnp.zeros((), jnp.int32)
        if cache is not None:
            cache.check_room(t)
            length = cache.length
        if positions is None:
            positions = length + jnp.arange(t)[None]
        causal = mask is None and cache is None  # known by name, which fused attention can do
        if mask is None and cache is not None:
            mask = causal_mask(t, cache.size, offset=length)
        x, rotary = self.place(embeds, positions)
        rate, keys = getattr(self.cfg, "dropout", 0.0), None
        if (rate or getattr(self.cfg, "attention_dropout", None)) and not deterministic:
            if rngs is None:
                raise ValueError("dropout acts, so pass rngs=nnx.Rngs(dropout=key)")
            keys = split(next_key(rngs.dropout), self.cfg.num_layers + 1)
            x, keys = drop(x, rate, keys[0]), keys[1:]
        x, cache = run_blocks(
            self.blocks,
            lambda block, x, past, key: block(
                x, mask, past, length, causal=causal, rotary=rotary, key=key
            ),
            x,
            cache=cache,
            keys=keys,
            remat=self.cfg.remat,
        )
        if cache is not None:
            cache = dataclasses.replace(cache, length=length + t)
        return self.final_norm(x), cache
