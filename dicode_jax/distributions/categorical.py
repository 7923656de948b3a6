"""Draws from a vocabulary: the likeliest tokens alone, by their number or by their probability.

Both take logits and give logits, minus infinity where a token is left out, so that a softmax
spreads what was cut over the rest. Limits may be traced: another one compiles nothing.
"""

import jax
import jax.numpy as jnp

from dicode_jax.typing import Array, Float, typechecked


@typechecked
def keep_top_k(logits: Float[Array, "... v"], k: int | Array) -> Float[Array, "... v"]:
    """Leaves out what is less likely than the `k`-th token; its equals stay.

    Args:
      k: From 1; the vocabulary's size or more keeps everything.
    """
    rank = jnp.clip(jnp.asarray(k, jnp.int32), 1, logits.shape[-1]) - 1
    least = jnp.take(jnp.flip(jnp.sort(logits, axis=-1), axis=-1), rank, axis=-1)
    return jnp.where(logits < least[..., None], -jnp.inf, logits)


@typechecked
def keep_top_p(logits: Float[Array, "... v"], p: float | Array) -> Float[Array, "... v"]:
    """Keeps the likeliest tokens up to the one with which their probabilities sum to `p`.

    Args:
      p: Above 0; the likeliest token always stays.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    order = jnp.argsort(-probs, axis=-1)
    ordered = jnp.take_along_axis(probs, order, axis=-1)
    kept = jnp.cumsum(ordered, axis=-1) - ordered < jnp.asarray(p, probs.dtype)
    kept = kept.at[..., 0].set(True)
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)
