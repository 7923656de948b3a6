"""Attention masks and positions for language models. True means: this query may look at this key.

Masks are made here and handed to the model, which never builds one for padding by itself. Combine
them with `&`: `causal_mask(t) & key_mask(valid)`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dicode_jax.typing import Array, Bool, Int, typechecked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelMask:
    """Who sees whom by what positions are called: a mask that attention makes block by block.

    It stands for `sees(queries[:, None], keys[None])`, which for a long sequence is too large.

    Attributes:
      queries: Labels of the queries, `[t, n]`.
      keys: Labels of the keys, `[s, n]`.
      sees: `(labels [..., n], labels [..., n])`, which broadcast, to bool `[...]`.
    """

    queries: Int[Array, "t n"]
    keys: Int[Array, "s n"]
    sees: Callable[[Array, Array], Array] = dataclasses.field(metadata={"static": True})

    def dense(self) -> Bool[Array, "t s"]:
        """The whole mask."""
        return self.sees(self.queries[:, None], self.keys[None])


def causal_mask(
    num_queries: int, num_keys: int | None = None, *, offset: int | Array = 0
) -> Bool[Array, "1 1 t s"]:
    """Query `i` sees the keys `0 .. i + offset`.

    Args:
      num_queries: Positions computed now, `t`.
      num_keys: Keys or cache slots, `s`; `num_queries` by default.
      offset: Position of the first query, that is the number of keys before it. May be traced, as
        the `length` of a cache is.
    """
    keys = jnp.arange(num_queries if num_keys is None else num_keys)
    return (keys[None, :] <= jnp.arange(num_queries)[:, None] + offset)[None, None]


@typechecked
def key_mask(valid: Bool[Array, "b s"]) -> Bool[Array, "b 1 1 s"]:
    """Hides padded keys from every query; `valid` is False at padding, left or right."""
    return valid[:, None, None, :]


@typechecked
def segment_mask(segments: Int[Array, "b t"]) -> Bool[Array, "b 1 t t"]:
    """Queries see keys of their own segment only: several sequences packed into one row."""
    return (segments[:, :, None] == segments[:, None, :])[:, None]


@typechecked
def positions_from_valid(valid: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Positions that count valid tokens only: 0 at the first valid token of a row.

    Padding before the first valid token gets 0, padding after the last one repeats its position;
    what a model computes there is undefined anyway.
    """
    return jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=-1) - 1, 0)
