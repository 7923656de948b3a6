"""A diagonal Gaussian whose draws are scaled to unit length: the posterior of AR-Diffusion's VAE.

The original's `mode()` also puts the unit vector in place of the mean, so that a divergence asked
for afterwards is another one; here it is always that of the Gaussian itself.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dicode_jax.distributions.diagonal_gaussian import DiagonalGaussian
from dicode_jax.typing import Array, Float

SMALLEST = 1e-12  # length that a vector is divided by


def unit(x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    """Vectors along the last axis at length one, float32; a zero vector stays zero."""
    x = x.astype(jnp.float32)
    squares = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, SMALLEST**2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProjectedGaussian:
    """Directions along the last axis of what `gaussian` draws."""

    gaussian: DiagonalGaussian

    def sample(
        self, key: Array | None = None, *, noise: Float[Array, "b ..."] | None = None
    ) -> Float[Array, "b ..."]:
        """A unit vector for each place; see `DiagonalGaussian.sample`."""
        return unit(self.gaussian.sample(key, noise=noise))

    def mode(self) -> Float[Array, "b ..."]:
        """The direction of the mean."""
        return unit(self.gaussian.mean)

    def around(self, std: float) -> "ProjectedGaussian":
        """The same directions, and draws around them with noise of this size in each number."""
        mode = self.mode()
        logvar = jnp.full_like(mode, 2 * jnp.log(std))
        return ProjectedGaussian(DiagonalGaussian(mean=mode, logvar=logvar))

    def kl(self) -> Float[Array, " b"]:
        """Divergence of the Gaussian, before its draws are scaled, from the standard normal."""
        return self.gaussian.kl()
