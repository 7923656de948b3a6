"""Diagonal Gaussian posterior of a variational autoencoder (Kingma and Welling, 2014)."""

import dataclasses

import jax
import jax.numpy as jnp

from dicode_jax.typing import Array, Float

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagonalGaussian:
    """Independent normals, one per number of `mean`; float32.

    Attributes:
        mean: [b, ...].
        logvar: natural logarithm of the variance, [b, ...].
    """

    mean: Float[Array, "b ..."]
    logvar: Float[Array, "b ..."]

    @classmethod
    def from_moments(cls, moments: Float[Array, "b ... c2"]) -> "DiagonalGaussian":
        """Splits the last axis into mean and log-variance; the latter is clamped to [-30, 20]."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean=mean, logvar=jnp.clip(logvar, LOGVAR_MIN, LOGVAR_MAX))

    def sample(
        self, key: Array | None = None, *, noise: Float[Array, "b ..."] | None = None
    ) -> Float[Array, "b ..."]:
        """Draws mean + std * noise.

        Args:
            key: one typed key, or keys [b], one per sample: a draw then ignores the batch size.
            noise: standard normal numbers of the shape of `mean`, instead of a key.

        Raises:
            ValueError: neither or both of key and noise were given, or noise has another shape.
        """
        if key is not None and noise is None:
            if key.ndim == 1:
                shape = self.mean.shape[1:]
                noise = jax.vmap(lambda k: jax.random.normal(k, shape, self.mean.dtype))(key)
            else:
                noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        elif key is not None or noise is None:
            raise ValueError("sample needs exactly one of key and noise")
        if noise.shape != self.mean.shape:
            raise ValueError(
                f"noise must have the shape of the mean, {self.mean.shape}, got {noise.shape}"
            )
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def mode(self) -> Float[Array, "b ..."]:
        """The mean."""
        return self.mean

    def kl(self) -> Float[Array, " b"]:
        """Divergence from the standard normal in nats, summed over everything but the batch."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * terms.sum(tuple(range(1, terms.ndim)))
