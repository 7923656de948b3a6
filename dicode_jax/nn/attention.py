"""The one door to attention: scaled dot products with the softmax in float32.

Which implementation runs is chosen here and nowhere else. Masks are built by the caller.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from dicode_jax.nn.dropout import drop
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
    dropout: float = 0.0,
    dropout_key: Array | None = None,
) -> Float[Array, "b t h d"]:
    """Attends `query` to `key`/`value`, which may have fewer heads.

    With `g < h` heads each of them serves `h / g` query heads in a row.

    Args:
      mask: True where a query may look at a key. A row without any True is a uniform average over
        the keys (a finite mask value, no NaN).
      bias: Added to the scores after they were scaled.
      scale: Multiplies the scores; `d ** -0.5` by default.
      dropout: Rate of dropout on the weights, in [0, 1).
      dropout_key: As in `nn.rngs.draw`; None for no dropout.

    Returns:
      The weighted values; zeros when there are no keys at all (`s == 0`).

    Raises:
      ValueError: Dropout together with a bias or with fewer heads of keys than of queries.
    """
    if key.shape[1] == 0:
        return jnp.zeros_like(query)
    has_dropout = dropout_key is not None and dropout > 0
    is_plain = bias is None and query.shape[2] == key.shape[2]
    if has_dropout and not is_plain:
        raise ValueError("attention with dropout takes no bias and equal numbers of heads")
    if is_plain and (has_dropout or mask is not None):
        return _deferred(query, key, value, mask, scale, dropout, dropout_key)
    return jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale)


def attend(
    query: Float[Array, "b t hd"],
    key: Float[Array, "b s gd"],
    value: Float[Array, "b s gd"],
    *,
    head_dim: int,
    **options,
) -> Float[Array, "b t hd"]:
    """`dot_product_attention` of what linear layers give: all heads side by side on one axis."""
    heads = (rearrange(x, "b t (h d) -> b t h d", d=head_dim) for x in (query, key, value))
    return rearrange(dot_product_attention(*heads, **options), "b t h d -> b t (h d)")


def _deferred(query, key, value, mask, scale, rate, rng):
    """Weights are normalised after they met the values, with heads next to the batch.

    On CPU, masked, the gradient takes half the time of `jax.nn.dot_product_attention`: 5.8 against
    14 ms at 100 positions, 101 against 192 ms at 512.
    """
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # [b, h, t|s, d]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = query * jnp.asarray(scale, query.dtype)
    scores = jnp.einsum("bhtd,bhsd->bhts", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    weights = drop(weights, rate, rng).astype(value.dtype)
    out = jnp.einsum("bhts,bhsd->bhtd", weights, value, preferred_element_type=jnp.float32)
    return (out / total).astype(value.dtype).swapaxes(1, 2)
