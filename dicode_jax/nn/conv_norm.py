"""A convolution, batch normalisation with stored statistics and a ReLU, as Inception nets have."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.typing import Array, Float

EPSILON = 1e-3  # of TensorFlow's slim, from which the published weights come


class ConvNorm(nnx.Module):
    """One unit of an Inception network, over as many axes as its kernel has; it is not trained.

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        kernel_size: places along each axis before the channels.
        strides: of all axes.
        padding: "SAME", zeros as TensorFlow adds them, or "VALID", none.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        strides: int = 1,
        padding: str = "SAME",
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = nnx.Conv(
            in_features,
            out_features,
            tuple(kernel_size),
            strides=strides,
            padding=padding,
            use_bias=False,
            **options,
        )
        self.norm = nnx.BatchNorm(
            out_features, use_running_average=True, epsilon=EPSILON, **options
        )

    def __call__(self, x: Float[Array, "b *n c"]) -> Float[Array, "b *m o"]:
        """The unit's output, nothing of it below 0."""
        return jax.nn.relu(self.norm(self.conv(x)))
