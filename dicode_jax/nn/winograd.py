"""Convolutions of three by three with fewer products: Winograd's F(2x2, 3x3), for CPUs.

A tile of 2 x 2 results takes 16 products for each pair of channels in place of 36, by sums of the
inputs and of the results (Lavin and Gray, arXiv 1509.09308, section 4.1); an image that is doubled
first takes 9, as a quarter of the sums are zero and none has to see the doubled image. All sums are
of at most four numbers, so that results are as exact as those of a plain convolution.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from dicode_jax.typing import Array, Float

Four = list[Array]


@jax.checkpoint  # gradients would keep four times the input
def convolve(
    x: Float[Array, "n h w c"], kernel: Float[Array, "3 3 c o"]
) -> Float[Array, "n h w o"]:
    """Convolves images, whose sides are even, with zeros around them."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # The barrier keeps XLA from taking the sums along height four times, once for each along width.
    rows = jax.lax.optimization_barrier(_tile_sums(x, 1))
    sums = [_tile_sums(row, 2) for row in rows]
    return _results(sums, _kernel_sums(kernel))


@jax.checkpoint
def convolve_columns(
    x: Float[Array, "n h w c"], kernel: Float[Array, "3 1 c o"]
) -> Float[Array, "n h w o"]:
    """Convolves along the height of images, which is even, with zeros above and below.

    It takes 4 products for two results in place of 6.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    kernels = _along(list(kernel[:, 0]))
    pair = _pair([a @ k for a, k in zip(_tile_sums(x, 1), kernels, strict=True)])
    return rearrange(jnp.stack(pair, 2), "n h p w o -> n (h p) w o")


@jax.checkpoint
def convolve_doubled(
    x: Float[Array, "n h w c"], kernel: Float[Array, "3 3 c o"]
) -> Float[Array, "n h2 w2 o"]:
    """Convolves images that nearest neighbours double first, with zeros around them."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    sums = [_doubled_sums(row, 2) for row in _doubled_sums(x, 1)]
    # Of a doubled tile (a, b, b, c) the sums are a - b, 2 b, 0, b - c. The two goes to the kernel.
    used = (0, 1, 3)
    scale = (1, 2, 1)
    kernels = _kernel_sums(kernel)
    kernels = [
        [kernels[i][j] * (m * n) for j, n in zip(used, scale, strict=True)]
        for i, m in zip(used, scale, strict=True)
    ]
    return _results(sums, kernels)


def _tile_sums(x: Array, axis: int) -> Four:
    """Sums of tiles of four that begin at every second place, along an axis with its padding."""
    last = x.shape[axis] - 4
    a, b, c, d = (jax.lax.slice_in_dim(x, i, i + last + 1, 2, axis) for i in range(4))
    return [a - c, b + c, c - b, b - d]


def _doubled_sums(x: Array, axis: int) -> list[Array]:
    """The sums of `_tile_sums` of the doubled image that are not zero, the second halved."""
    count = x.shape[axis] - 2
    a, b, c = (jax.lax.slice_in_dim(x, i, i + count, 1, axis) for i in range(3))
    return [a - b, b, b - c]


def _kernel_sums(kernel: Array) -> list[Four]:
    """What stands for a kernel between sums of the inputs and of the results."""
    return [_along(list(row)) for row in _along(list(kernel))]


def _along(parts: list[Array]) -> Four:
    a, b, c = parts
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def _results(sums: list[list[Array]], kernels: list[list[Array]]) -> Array:
    """Products of sums and kernels, summed to tiles of two by two."""
    products = [
        [a @ k for a, k in zip(*pair, strict=True)] for pair in zip(sums, kernels, strict=True)
    ]
    rows = [_pair(list(column)) for column in zip(*products, strict=True)]
    tiles = jnp.stack([jnp.stack(_pair(list(row)), 3) for row in zip(*rows, strict=True)], 2)
    return rearrange(tiles, "n h p w q o -> n (h p) (w q) o")


def _pair(parts: list[Array]) -> list[Array]:
    """Two results of a tile; without the third sum where it is zero."""
    if len(parts) == 3:
        a, b, d = parts
        return [a + b, b - d]
    a, b, c, d = parts
    return [a + b + c, b - c - d]
