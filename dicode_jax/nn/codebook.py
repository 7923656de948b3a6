"""How codes learn without gradients: a k-means start, moving averages, revival of unused ones.

van den Oord et al. (arXiv 1711.00937, appendix A.1); revival as in Zeghidour et al., "SoundStream"
(arXiv 2107.03312, section III-C); `rotate` is the gradient of Fifty et al., "Restructuring Vector
Quantization with the Rotation Trick" (arXiv 2410.06424). All are pure functions of whole batches:
on any mesh every device has the same codes.

Shape letters: n vectors, v codes, c their width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dicode_jax.nn.quantizer import nearest
from dicode_jax.typing import Array, Float, Int, typechecked

EPS = 1e-5  # added to every count, so that none is zero
SMALL = 1e-6  # of lengths


class Codebook(NamedTuple):
    """Codes, and what they are averages of.

    Attributes:
      codes: Float32 [v, c].
      counts: Vectors of a batch that went to each code, averaged over batches, [v]; all 0 before
        the start.
      sums: Sums of these vectors, averaged likewise, [v, c].
    """

    codes: Array
    counts: Array
    sums: Array

    @property
    def is_started(self) -> Array:
        """Whether the codes stand for anything yet, bool []."""
        return self.counts.sum() > 0

    @property
    def perplexity(self) -> Array:
        """How many codes used equally often would say as much, float32 []."""
        shares = self.counts / jnp.maximum(self.counts.sum(), EPS)
        return jnp.exp(-jnp.sum(shares * jnp.log(jnp.maximum(shares, 1e-30))))


def _gathered(x: Array, ids: Array, count: int) -> tuple[Array, Array]:
    """Number and sum of the vectors of each code."""
    total = lambda y: jax.ops.segment_sum(y, ids, count)  # noqa: E731
    return total(jnp.ones(len(x))), total(x)


def _drawn(x: Float[Array, "n c"], key: Array, count: int) -> Float[Array, "v c"]:
    """Random vectors, none twice where there are enough."""
    if len(x) >= count:
        return x[jax.random.permutation(key, len(x))[:count]]
    return x[jax.random.randint(key, (count,), 0, len(x))]


@typechecked
def start(x: Float[Array, "n c"], key: Array, count: int, *, rounds: int) -> Codebook:
    """Means of vectors by so many rounds of k-means from random ones of them."""

    def one(_, book: Codebook) -> Codebook:
        counts, sums = _gathered(x, nearest(x, book.codes), count)
        means = sums / jnp.maximum(counts, 1)[:, None]
        codes = jnp.where(counts[:, None] > 0, means, book.codes)
        return Codebook(codes, counts, codes * counts[:, None])

    codes = _drawn(x, key, count)
    return jax.lax.fori_loop(0, rounds, one, Codebook(codes, jnp.zeros(count), 0 * codes))


@typechecked
def averaged(
    book: Codebook, x: Float[Array, "n c"], ids: Int[Array, " n"], *, decay: float
) -> Codebook:
    """The codes after a batch of vectors that went to the codes `ids`."""
    counts, sums = (
        decay * old + (1 - decay) * new
        for old, new in zip(book[1:], _gathered(x, ids, len(book.codes)), strict=True)
    )
    total = counts.sum()
    smooth = (counts + EPS) / (total + len(counts) * EPS) * total
    return Codebook(sums / smooth[:, None], counts, sums)


@typechecked
def revived(book: Codebook, x: Float[Array, "n c"], key: Array, *, below: float) -> Codebook:
    """Puts random vectors in the place of codes with counts below `below`, averages included."""
    dead, fresh = (book.counts < below)[:, None], _drawn(x, key, len(book.codes))
    return Codebook(
        jnp.where(dead, fresh, book.codes),
        jnp.where(dead[:, 0], below, book.counts),
        jnp.where(dead, below * fresh, book.sums),
    )


@typechecked
def rotate(x: Float[Array, "*n c"], codes: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    """`codes`, with the gradient of the rotation and scaling that turn `x` into them."""
    fixed, codes = jax.lax.stop_gradient((x, codes))
    lengths = [jnp.linalg.norm(y, axis=-1, keepdims=True) for y in (fixed, codes)]
    u, q = (y / jnp.maximum(size, SMALL) for y, size in zip((fixed, codes), lengths, strict=True))
    between = u + q
    w = between / jnp.maximum(jnp.linalg.norm(between, axis=-1, keepdims=True), SMALL)
    dot = lambda a, b: jnp.sum(a * b, axis=-1, keepdims=True)  # noqa: E731
    turned = x - 2 * dot(x, w) * w + 2 * dot(x, u) * q
    return turned * (lengths[1] / jnp.maximum(lengths[0], SMALL))
