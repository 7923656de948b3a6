"""Losses of the deep-token language model, with a mask of valid keyframes.

Of the reference's `vec_loss`: distances between vectors, and the mixture's negative log-likelihood.
The reference drops invalid keyframes before it averages; here shapes are static, so
every average is over the valid ones by weight. All of it is float32.

Letters: b batch, k keyframes, n deep tokens per keyframe, z size of a vector, p head outputs.
"""

import jax.numpy as jnp

from dicode_jax.distributions.gaussian_mixture import GaussianMixture
from dicode_jax.typing import Array, Bool, Float, Int, typechecked

VECTOR_LOSSES = ("mse", "l1", "cosine")
LOSSES = ("gmm", *VECTOR_LOSSES)


def normalize(x: Float[Array, "... z"]) -> Float[Array, "... z"]:
    """Scales vectors to length one (shorter than 1e-12: left at their direction times that)."""
    # The inner floor keeps the gradient at the zero vector finite.
    squared = jnp.square(x).sum(-1, keepdims=True)
    return x / jnp.maximum(jnp.sqrt(jnp.maximum(squared, 1e-30)), 1e-12)


def masked_mean(x: Float[Array, "b k ..."], mask: Bool[Array, "b k"] | None) -> Float[Array, ""]:
    """Mean over the valid keyframes and everything behind them; 0 when none is valid."""
    if mask is None:
        return x.mean()
    weight = mask.reshape(*mask.shape, *[1] * (x.ndim - 2))
    count = mask.sum() * (x.size // mask.size)
    return jnp.where(weight, x, 0.0).sum() / jnp.maximum(count, 1).astype(x.dtype)


@typechecked
def vector_loss(
    name: str,
    pred: Float[Array, "b k n z"],
    target: Float[Array, "b k n z"],
    mask: Bool[Array, "b k"] | None = None,
) -> Float[Array, ""]:
    """A distance between vectors, averaged.

    Args:
      name: `mse`, `l1` or `cosine` (1 minus the cosine).
      pred: What the model says.
      target: What it should say.
      mask: Valid keyframes; None for all.

    Raises:
      ValueError: The name is unknown.
    """
    if name not in VECTOR_LOSSES:
        raise ValueError(f"unknown vector loss {name!r}; known are {', '.join(VECTOR_LOSSES)}")
    pred, target = pred.astype(jnp.float32), target.astype(jnp.float32)
    if name == "cosine":
        return 1 - masked_mean(_cosine(pred, target), mask)
    distance = jnp.abs if name == "l1" else jnp.square
    return masked_mean(distance(pred - target), mask)


def _cosine(x: Array, y: Array) -> Array:
    floor = 1e-8**2  # of the squared norms
    squares = [jnp.maximum(jnp.square(v).sum(-1), floor) for v in (x, y)]
    return (x * y).sum(-1) / jnp.sqrt(squares[0] * squares[1])


@typechecked
def mixture_loss(
    raw: Float[Array, "b k n p"],
    target: Float[Array, "b k n z"],
    mask: Bool[Array, "b k"] | None = None,
    *,
    num_mixtures: int,
    balance: bool = False,
    samples: Int[Array, "b k"] | None = None,
) -> Float[Array, ""]:
    """Negative log-likelihood of a Gaussian mixture, divided by the size of a vector.

    Args:
      raw: Head outputs, see `GaussianMixture.from_params`.
      target: The vectors that occurred.
      mask: Valid keyframes; None for all.
      num_mixtures: Number of components.
      balance: Every sample counts the same, however many valid keyframes it has.
      samples: Which sample of its row a keyframe belongs to, for `balance`; None when a row is one.
    """
    mixture = GaussianMixture.from_params(raw, num_mixtures)
    target = target.astype(jnp.float32)
    log_prob = mixture.log_prob(target)  # [b, k, n]
    if balance:
        b, k, n = log_prob.shape
        valid = jnp.ones((b, k), bool) if mask is None else mask
        size, count = _sample_sizes(valid, samples), num_samples(valid, samples)
        share = n / (n * size.astype(jnp.float32) + 1e-6)  # of a keyframe in its sample
        weighted = jnp.where(valid[..., None], log_prob * share[..., None], 0.0)
        loss = -weighted.sum() / (jnp.maximum(count, 1) * n)
    else:
        loss = -masked_mean(log_prob, mask)
    return loss / target.shape[-1]


def num_samples(valid: Bool[Array, "b k"], samples: Int[Array, "b k"] | None) -> Float[Array, ""]:
    """How many samples `mixture_loss` with `balance` is a mean over."""
    if samples is None:
        return jnp.asarray(len(valid), jnp.float32)
    return jnp.where(valid, 1 / jnp.maximum(_sample_sizes(valid, samples), 1), 0.0).sum()


def _sample_sizes(valid: Array, samples: Array | None) -> Array:
    """Valid keyframes in the sample of each keyframe: [b, k], or [b, 1] when a row is a sample."""
    if samples is None:
        return valid.sum(1, keepdims=True)
    same = (samples[:, :, None] == samples[:, None, :]) & valid[:, None, :]
    return same.sum(-1)
