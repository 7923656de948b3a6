"""How a condition steers a transformer: adaptive scale, shift and gate, and embedded timesteps.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), adaLN-Zero; with
a timestep for every frame each frame has its own factors.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.nn.embeddings import timestep_embedding
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.transformer import MakeLinear
from dicode_jax.typing import Array, Float, Int


class Modulation(nnx.Module):
    """`Linear(SiLU(condition))` in `count` equal parts; all zero before training.

    Args:
      dim: Width of the condition.
      count: Number of parts; 6 for shift, scale and gate of attention and of the feed-forward.
      part_dim: Width of each part; `dim` when None.
    """

    def __init__(
        self,
        dim: int,
        count: int,
        *,
        part_dim: int | None = None,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.count = count
        zeros = nnx.initializers.zeros_init()
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.linear = Linear(dim, count * (part_dim or dim), kernel_init=zeros, **options)

    def __call__(self, condition: Float[Array, "... d"]) -> list[Float[Array, "... p"]]:
        """The parts, each of the condition's leading axes."""
        return jnp.split(self.linear(jax.nn.silu(condition)), self.count, axis=-1)


def modulate(
    x: Float[Array, "b f n d"], shift: Float[Array, "b f d"], scale: Float[Array, "b f d"]
) -> Float[Array, "b f n d"]:
    """`x (1 + scale) + shift`, the same for all tokens of a frame."""
    return x * (1 + scale[:, :, None]) + shift[:, :, None]


class TimestepEmbedder(nnx.Module):
    """Timesteps to vectors: sinusoids of width `sinusoid_dim`, then two layers with a SiLU.

    Args:
      dim: Width of the vectors.
      sinusoid_dim: Width of the sinusoids.
      hidden_dim: Width between the layers; `dim` when None.
      linear: Makes the layers.
      last: Makes the second one; `linear` when None.
    """

    def __init__(
        self,
        dim: int,
        *,
        sinusoid_dim: int = 256,
        hidden_dim: int | None = None,
        linear: MakeLinear,
        last: MakeLinear | None = None,
    ):
        self.sinusoid_dim = sinusoid_dim
        self.first = linear(sinusoid_dim, hidden_dim or dim)
        self.last = (last or linear)(hidden_dim or dim, dim)

    def __call__(self, timesteps: Int[Array, "..."] | Float[Array, "..."]) -> Float[Array, "... d"]:
        """Vectors for timesteps as they are, 0 to some hundreds; any number of axes."""
        return self.last(jax.nn.silu(self.first(timestep_embedding(timesteps, self.sinusoid_dim))))
