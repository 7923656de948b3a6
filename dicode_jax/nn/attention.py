"""Scaled dot-product attention with the softmax in float32. Masks are built by the caller."""

import jax
import jax.numpy as jnp

from dicode_jax.typing import Array, Bool, Float, typechecked


@typechecked
def dot_product_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g d"],
    *,
    mask: Bool[Array, "#b #h #t s"] | None = None,
    bias: Float[Array, "#b h t s"] | None = None,
    scale: float | None = None,
) -> Float[Array, "b t h d"]:
    """Attends `query` to `key`/`value`, which may have fewer heads.

    With `g < h` heads each of them serves `h / g` query heads in a row.

    Args:
      mask: True where a query may look at a key. A row without any True is a uniform average over
        the keys (a finite mask value, no NaN).
      bias: Added to the scores after they were scaled.
      scale: Multiplies the scores; `d ** -0.5` by default.

    Returns:
      The weighted values; zeros when there are no keys at all (`s == 0`).
    """
    if key.shape[1] == 0:
        return jnp.zeros_like(query)
    return jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale)
