"""Losses of the deep-token language model, with a mask of valid keyframes.

The reference's `vec_loss`: distances between vectors, the mixture's negative log-likelihood and a
small VAE. The reference drops invalid keyframes before it averages; here shapes are static, so
every average is over the valid ones by weight. All of it is float32.

Letters: b batch, k keyframes, n deep tokens per keyframe, z size of a vector, p head outputs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dicode_jax.distributions.gaussian_mixture import GaussianMixture
from dicode_jax.typing import Array, Bool, Float, Int, typechecked

VECTOR_LOSSES = ("mse", "l1", "cosine", "l1l2", "l1l2cos")
LOSSES = (*VECTOR_LOSSES, "gmm", "vae")


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
    return jnp.where(weight, x, 0.0).sum() / jnp.maximum(count, 1)


@typechecked
def vector_loss(
    name: str,
    pred: Float[Array, "b k n z"],
    target: Float[Array, "b k n z"],
    mask: Bool[Array, "b k"] | None = None,
    *,
    reduction: str = "mean",
) -> Float[Array, ""]:
    """A distance between vectors, averaged.

    Args:
      name: `mse`, `l1`, `cosine` (1 minus the cosine), or the sums `l1l2` and `l1l2cos`.
      pred: What the model says.
      target: What it should say.
      mask: Valid keyframes; None for all.
      reduction: `mean`, or `batchmean` (only `mse`): summed over a vector, averaged over the rest.

    Raises:
      ValueError: The name or the reduction is unknown.
    """
    if name not in VECTOR_LOSSES:
        raise ValueError(f"unknown vector loss {name!r}; known are {', '.join(VECTOR_LOSSES)}")
    if reduction not in ("mean", "batchmean") or (reduction == "batchmean" and name != "mse"):
        raise ValueError(f"{name} loss has no reduction {reduction!r}; use 'mean'")
    pred, target = pred.astype(jnp.float32), target.astype(jnp.float32)
    difference = pred - target
    total = jnp.zeros((), jnp.float32)
    if name in ("l1", "l1l2", "l1l2cos"):
        total += masked_mean(jnp.abs(difference), mask)
    if name in ("mse", "l1l2", "l1l2cos"):
        mse = masked_mean(jnp.square(difference), mask)
        total += mse * target.shape[-1] if reduction == "batchmean" else mse
    if name in ("cosine", "l1l2cos"):
        total += 1 - masked_mean(_cosine(pred, target), mask)
    return total


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
    with_mse_and_l1: bool = False,
    balance: bool = False,
    samples: Int[Array, "b k"] | None = None,
) -> Float[Array, ""]:
    """Negative log-likelihood of a Gaussian mixture, divided by the size of a vector.

    Args:
      raw: Head outputs, see `GaussianMixture.from_params`.
      target: The vectors that occurred.
      mask: Valid keyframes; None for all.
      num_mixtures: Number of components.
      with_mse_and_l1: Add both distances of the mixture's expected value.
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
        share = n / (n * size + 1e-6)  # of a keyframe in its sample
        weighted = jnp.where(valid[..., None], log_prob * share[..., None], 0.0)
        loss = -weighted.sum() / (jnp.maximum(count, 1) * n)
    else:
        loss = -masked_mean(log_prob, mask)
    loss = loss / target.shape[-1]
    if with_mse_and_l1:
        loss += vector_loss("l1l2", mixture.expected_value(), target, mask)
    return loss


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


@typechecked
def vae_loss(
    raw: Float[Array, "b k n p"],
    target: Float[Array, "b k n z"],
    noise: Float[Array, "b k n q"],
    decoder: Callable[[Array], Array],
    mask: Bool[Array, "b k"] | None = None,
    *,
    kl_weight: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Squared error of a decoded latent sample plus the weighted KL divergence to a unit normal.

    Args:
      raw: `[mean q | log-variance q]`.
      target: The vectors that occurred.
      noise: Standard normal draws that make the latent.
      decoder: Latent `[..., q]` to vector `[..., z]`.
      mask: Valid keyframes; None for all.
      kl_weight: Factor of the KL term, which is summed over the latent and averaged over tokens.

    Returns:
      `(loss, KL term before its weight)`.
    """
    mean, log_variance = jnp.split(raw.astype(jnp.float32), 2, axis=-1)
    kl = -0.5 * (1 + log_variance - jnp.square(mean) - jnp.exp(log_variance)).sum(-1)
    kl = masked_mean(kl, mask)
    decoded = decoder(mean + jnp.exp(0.5 * log_variance) * noise)
    return vector_loss("mse", decoded, target, mask) + kl_weight * kl, kl


def vae_latent(raw: Float[Array, "... p"], noise: Array | None) -> Float[Array, "... q"]:
    """The latent of `[mean | log-variance]`: its mean, or a sample when noise is given."""
    mean, log_variance = jnp.split(raw.astype(jnp.float32), 2, axis=-1)
    return mean if noise is None else mean + jax.numpy.exp(0.5 * log_variance) * noise
