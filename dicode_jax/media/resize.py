"""Bilinear resizes as one matrix per axis, built on the host: torchvision's two and Pillow's.

Workers import this module, so it knows no jax. A matrix reads `length` samples from `start` on,
fractions of a sample included, out of `n`; as Pillow's `box`, its filter looks over the edge of
that part where there is an image beyond.
"""

import functools

import numpy as np
from jaxtyping import Float, UInt8


@functools.lru_cache(maxsize=8)  # a matrix may take 100 MB
def bilinear(
    n: int, m: int, start: float = 0.0, length: float | None = None
) -> Float[np.ndarray, "m n"]:
    """A bilinear resize to `m` samples with half-pixel centres, two taps whatever the factor."""
    # A float32 factor and one rounding at the end, as in PyTorch (a fused multiply-add).
    scale = np.float64(np.float32(n if length is None else length) / np.float32(m))
    position = np.clip(start + scale * (np.arange(m) + 0.5) - 0.5, 0, n - 1).astype(np.float32)
    base = np.floor(position).astype(np.int64)
    t = (position - base).astype(np.float64)
    taps = np.minimum(base[:, None] + np.arange(2), n - 1)
    return scatter(np.stack([1 - t, t], axis=1), taps, n)


@functools.lru_cache(maxsize=8)  # a matrix may take 100 MB
def triangle(
    n: int, m: int, start: float = 0.0, length: float | None = None
) -> Float[np.ndarray, "m n"]:
    """The same, antialiased: the triangle widens with the factor where samples become fewer."""
    # The factor is rounded where PyTorch does so.
    scale = np.float64(np.float32(n if length is None else length) / np.float32(m))
    support = max(scale, 1.0)
    centre = start + (scale * (np.arange(m) + 0.5)).astype(np.float32).astype(np.float64)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), n)
    sample = np.arange(n)
    matrix = np.maximum(1 - np.abs(sample + 0.5 - centre[:, None]) / support, 0)
    matrix *= (sample >= first[:, None]) & (sample < last[:, None])
    return matrix / matrix.sum(axis=1, keepdims=True)


def scatter(weights: Float[np.ndarray, "m k"], taps: np.ndarray, n: int) -> np.ndarray:
    """Sums weights [m, k] at the columns taps [m, k] of an [m, n] matrix."""
    matrix = np.zeros((len(taps), n))
    np.add.at(matrix, (np.arange(len(taps))[:, None], taps), weights)
    return matrix


def resize_square(
    image: UInt8[np.ndarray, "h w 3"],
    size: int,
    box: tuple[float, float, float, float],
    *,
    antialias: bool,
) -> Float[np.ndarray, "s s 3"]:
    """The part (left, top, right, bottom) of an image as a square, in 0..255 and not rounded."""
    return resize_part(image, (size, size), box, antialias=antialias)


def resize_part(
    image: UInt8[np.ndarray, "h w 3"],
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    *,
    antialias: bool,
) -> Float[np.ndarray, "y x 3"]:
    """The same in any height and width."""
    left, top, right, bottom = box
    build = triangle if antialias else bilinear
    h, w, _ = image.shape
    x = _banded(build(h, size[0], top, bottom - top), image)
    return _banded(build(w, size[1], left, right - left), x.swapaxes(0, 1)).swapaxes(0, 1)


def middle(frame: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "y x 3"]:
    """The largest middle part of the shape of `size`, in that size; one of the size as it is."""
    (y, x), (h, w) = size, frame.shape[:2]
    if (h, w) == (y, x):
        return frame
    scale = min(h / y, w / x)
    rows, columns = scale * y, scale * x
    small = _banded(triangle(h, y, (h - rows) / 2, rows), frame)
    across = triangle(w, x, (w - columns) / 2, columns)
    small = _banded(across, small.swapaxes(0, 1)).swapaxes(0, 1)
    return np.clip(np.round(small), 0, 255).astype(np.uint8)


def _banded(matrix: np.ndarray, x: np.ndarray) -> Float[np.ndarray, "m ..."]:
    """A product [m, n] x [n, ...]; only what a row reads becomes floats at once, and is summed."""
    out = np.empty((len(matrix), *x.shape[1:]), np.float32)
    for i, row in enumerate(matrix.astype(np.float32)):
        taps = np.flatnonzero(row)
        read = slice(taps[0], taps[-1] + 1)
        out[i] = np.tensordot(row[read], x[read].astype(np.float32), 1)
    return out
