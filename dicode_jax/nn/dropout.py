"""Dropout, for a whole batch or row by row."""

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.nn.rngs import draw, next_key
from dicode_jax.typing import Array


def drop(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes a fraction `rate` of `x` and rescales the rest.

    Args:
      key: As in `nn.rngs.draw`; None leaves `x` as it is.
    """
    if key is None or rate == 0:
        return x
    keep = draw(lambda k, shape: jax.random.bernoulli(k, 1 - rate, shape), key, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


def dropout(x: Array, rate: float, *, deterministic: bool, rngs: nnx.Rngs | None) -> Array:
    """`drop` with the `dropout` stream of `rngs`; the identity if `deterministic`.

    Raises:
      ValueError: Dropout is active but no `rngs` with a `dropout` (or default) stream was passed.
    """
    if deterministic or rate == 0:
        return x
    if rngs is None:
        raise ValueError(f"dropout {rate} needs rngs=nnx.Rngs(dropout=key), or deterministic=True")
    return drop(x, rate, next_key(rngs.dropout))
