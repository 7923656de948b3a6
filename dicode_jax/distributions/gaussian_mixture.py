"""Mixtures of diagonal Gaussians over vectors: the distribution of the next deep token.

DiCoDe's head (section 3 of the paper; `vec_loss` and its helpers in the reference). The raw output
of a head packs `[means m*z | raw variances m*z | logits m]`, the first two with the mixture index
outermost. The variance, not the standard deviation, is `max(softplus(raw), 1e-5)`; `var_scale`
multiplies it afterwards. Everything is computed in float32, whatever the input.

Letters: m mixture components, z size of a vector.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dicode_jax.typing import Array, Float, Int, PRNGKeyArray, typechecked

MIN_VARIANCE = 1e-5
_LOG_2PI = math.log(2 * math.pi)


def num_params(num_mixtures: int, dim: int) -> int:
    """Width of the raw head output for vectors of `dim` numbers."""
    return 2 * num_mixtures * dim + num_mixtures


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianMixture:
    """A batch of mixtures.

    Attributes:
      mean: Means of the components.
      variance: Their variances, one per number; 0 is allowed for sampling, not for densities.
      logits: Unnormalised log-weights.
    """

    mean: Float[Array, "... m z"]
    variance: Float[Array, "... m z"]
    logits: Float[Array, "... m"]

    @classmethod
    def from_params(
        cls,
        raw: Float[Array, "... p"],
        num_mixtures: int,
        *,
        var_scale: float | Array = 1.0,
        logits_temperature: float | Array = 1.0,
    ) -> "GaussianMixture":
        """Reads the raw output of a head.

        Args:
          raw: `p = 2 m z + m` numbers.
          num_mixtures: `m`.
          var_scale: Multiplies the variances after they were kept above 1e-5; 0 leaves the means.
          logits_temperature: Divides the logits: below 1 prefers the heavier components.

        Raises:
          ValueError: `p` is not a whole number of vectors, or a scale is out of range.
        """
        m, width = num_mixtures, raw.shape[-1]
        dim = (width - m) // (2 * m)
        if dim < 1 or num_params(m, dim) != width:
            raise ValueError(
                f"{width} numbers are no parameters of {m} Gaussians: 2*{m}*z + {m} is needed"
            )
        _check_scales(var_scale, logits_temperature)
        raw = raw.astype(jnp.float32)
        mean = raw[..., : m * dim].reshape(*raw.shape[:-1], m, dim)
        variance = raw[..., m * dim : 2 * m * dim].reshape(*raw.shape[:-1], m, dim)
        variance = jnp.maximum(_softplus(variance), MIN_VARIANCE)
        logits = raw[..., 2 * m * dim :]
        return cls(
            mean=mean,
            variance=variance if _is_one(var_scale) else variance * var_scale,
            logits=logits if _is_one(logits_temperature) else logits / logits_temperature,
        )

    @property
    def weights(self) -> Float[Array, "... m"]:
        """Probabilities of the components."""
        return jax.nn.softmax(self.logits, axis=-1)

    @property
    def log_weights(self) -> Float[Array, "... m"]:
        """Log-probabilities of the components."""
        return jax.nn.log_softmax(self.logits, axis=-1)

    @typechecked
    def component_log_prob(self, x: Float[Array, "... z"]) -> Float[Array, "... m"]:
        """Log-density of `x` under each component."""
        difference = x.astype(jnp.float32)[..., None, :] - self.mean
        terms = jnp.square(difference) / self.variance + jnp.log(self.variance)
        return -0.5 * (terms.sum(-1) + self.mean.shape[-1] * _LOG_2PI)

    @typechecked
    def log_prob(self, x: Float[Array, "... z"]) -> Float[Array, "..."]:
        """Log-density of `x`."""
        return jax.nn.logsumexp(self.log_weights + self.component_log_prob(x), axis=-1)

    def nll(self, x: Float[Array, "... z"]) -> Float[Array, ""]:
        """Mean negative log-density, divided by the size of a vector."""
        return -self.log_prob(x).mean() / self.mean.shape[-1]

    def expected_value(self) -> Float[Array, "... z"]:
        """Mean of the mixture: the means weighted by the components' probabilities."""
        return jnp.einsum("...m,...mz->...z", self.weights, self.mean)

    @typechecked
    def component_of(self, u: Float[Array, "..."]) -> Int[Array, "..."]:
        """The component that a uniform number in [0, 1) picks: inverse of the cumulated weights."""
        below = jnp.cumsum(self.weights, axis=-1) < u[..., None]
        return jnp.minimum(below.sum(-1), self.logits.shape[-1] - 1)

    @typechecked
    def sample_with(
        self, component: Int[Array, "..."], noise: Float[Array, "... z"]
    ) -> Float[Array, "... z"]:
        """The sample that the given component and standard normal noise make."""
        index = component[..., None, None]
        mean = jnp.take_along_axis(self.mean, index, axis=-2)[..., 0, :]
        variance = jnp.take_along_axis(self.variance, index, axis=-2)[..., 0, :]
        return mean + jnp.sqrt(variance) * noise

    def sample(self, key: PRNGKeyArray) -> Float[Array, "... z"]:
        """Draws a component, then a vector from it."""
        component_key, noise_key = jax.random.split(key)
        component = jax.random.categorical(component_key, self.logits, axis=-1)
        shape = (*self.logits.shape[:-1], self.mean.shape[-1])
        return self.sample_with(component, jax.random.normal(noise_key, shape))


@jax.custom_jvp
def _softplus(x: Array) -> Array:
    """Stable for any size; its gradient is cheaper on CPU than that of `jax.nn.softplus`."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@_softplus.defjvp
def _softplus_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return _softplus(x), jax.nn.sigmoid(x) * dx


def _is_one(scale) -> bool:
    return isinstance(scale, int | float) and scale == 1


def _check_scales(var_scale, logits_temperature) -> None:
    if isinstance(var_scale, int | float) and var_scale < 0:
        raise ValueError(f"var_scale must not be negative, got {var_scale}")
    if isinstance(logits_temperature, int | float) and logits_temperature <= 0:
        raise ValueError(f"logits_temperature must be positive, got {logits_temperature}")
