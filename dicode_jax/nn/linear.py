"""A linear layer that flattens its leading axes first.

XLA's CPU compiler turns the gradient of a 3-D matrix product with a bias into a slow loop: a layer
of 48 to 384 on [128, 64, 48] took 51 ms on one core, and 9 ms flattened. On other devices the
reshape costs nothing. On GPUs one row gets a second one of zeros: XLA would multiply it without
cuBLAS, and with more bytes. On CPUs the bias of a wide layer is added as a product with ones, so
that its gradient is a product too: XLA's sum of 800 rows of 32,784 took 109 ms, the product 5.
"""

import functools
import math

import jax.numpy as jnp
from flax import nnx

from dicode_jax.runtime.platform import platform
from dicode_jax.typing import Array

WIDE = 8192  # features from which a bias is added as a product on CPUs


class Linear(nnx.Linear):
    """`nnx.Linear` with the same parameters, for inputs of any number of axes."""

    def __call__(self, x: Array) -> Array:
        """Maps [..., in_features] to [..., out_features]."""
        lead, num_rows = x.shape[:-1], math.prod(x.shape[:-1])
        if num_rows == 1 and platform() == "gpu":  # XLA leaves one row to no library
            rows = jnp.pad(x.reshape(1, x.shape[-1]), ((0, 1), (0, 0)))
            return super().__call__(rows)[:1].reshape(*lead, -1)
        rows = x if len(lead) < 2 else x.reshape(num_rows, x.shape[-1])
        is_wide = rows.ndim == 2 and self.out_features >= WIDE
        if is_wide and self.bias is not None and platform() == "cpu":
            return self._wide(rows, self.bias[...]).reshape(*lead, -1)
        return super().__call__(rows).reshape(*lead, -1)

    def _wide(self, x: Array, bias: Array) -> Array:
        """Maps [n, in_features] to [n, out_features]; no gradient of it is a sum."""
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], bias), dtype=self.dtype)
        product = functools.partial(jnp.matmul, precision=self.precision)
        return product(x, kernel) + product(jnp.ones((len(x), 1), x.dtype), bias.reshape(1, -1))
