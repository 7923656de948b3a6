"""Errors of made pixels that several trainings weigh."""

import jax.numpy as jnp

from dicode_jax.nn.resnet import average_pool
from dicode_jax.typing import Array, Float


def edges(error: Float[Array, "n h w c"], scales: int = 3) -> Float[Array, ""]:
    """Mean absolute difference of neighbours, at full size and at `scales - 1` halvings."""
    total = jnp.zeros(())
    for scale in range(scales):
        error = average_pool(error) if scale else error
        total += jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    return total / scales


def psnr(error: Float[Array, "b ..."], span: float) -> Float[Array, ""]:
    """Mean over rows in dB, of errors of numbers that span `span`; at most 100 dB below it."""
    squares = jnp.square(error).mean(tuple(range(1, error.ndim)))
    return 10 * jnp.log10(span**2 / jnp.maximum(squares, 1e-10 * span**2)).mean()
