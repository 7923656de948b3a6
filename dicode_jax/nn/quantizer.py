"""Vector quantization: the nearest of a table of codes, in float32 throughout.

van den Oord et al., "Neural Discrete Representation Learning" (arXiv 1711.00937), with linear
layers to and from the narrow codes. A training moves the codes by averages, not by gradients.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.nn.linear import Linear
from dicode_jax.typing import Array, Float, Int, typechecked


class Quantizer(nnx.Module):
    """`project_in`, the nearest code by Euclidean distance, `project_out`.

    Args:
      dim: Width outside.
      num_codes: Number of codes.
      code_dim: Their width.
    """

    def __init__(
        self, dim: int, *, num_codes: int, code_dim: int, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        options = {"dtype": jnp.float32, "param_dtype": param_dtype, "rngs": rngs}
        self.project_in = Linear(dim, code_dim, **options)
        self.project_out = Linear(code_dim, dim, **options)
        codes = jax.random.normal(rngs.params(), (num_codes, code_dim), param_dtype)
        self.codes = nnx.Param(codes * code_dim**-0.5)

    @typechecked
    def encode(self, x: Float[Array, "*lead d"]) -> Int[Array, "*lead"]:
        """The ids of the nearest codes; of equally near ones the first."""
        return nearest(self.project_in(x), self.codes[...])

    @typechecked
    def decode(self, ids: Int[Array, "*lead"]) -> Float[Array, "*lead d"]:
        """Vectors for ids, float32."""
        return self.project_out(self.codes[...][ids])


@typechecked
def nearest(x: Float[Array, "*lead c"], codes: Float[Array, "v c"]) -> Int[Array, "*lead"]:
    """Ids of the codes nearest to vectors; of equally near ones the first."""
    x, codes = x.astype(jnp.float32), codes.astype(jnp.float32)
    flat = x.reshape(-1, x.shape[-1])
    squares = jnp.square(flat).sum(-1)[:, None] + jnp.square(codes).sum(-1)[None]
    ids = jnp.argmin(jnp.maximum(squares - 2 * flat @ codes.T, 0.0), axis=-1)
    return ids.astype(jnp.int32).reshape(x.shape[:-1])
