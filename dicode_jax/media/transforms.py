"""Pixel transforms as jittable functions: ranges, DiCoDe's two resizes, CLIP's normalisation.

Every resize is a product with one small matrix per axis, built on the host from the static sizes:
any size works under jit, and nothing is interpolated element by element. `clip_preprocess` gives
what DynamiCrafter's image embedder gets from kornia, `resize_bilinear` what torchvision does.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from dicode_jax.media.resize import bilinear, scatter, triangle
from dicode_jax.typing import Array, Float, UInt8, typechecked

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_float(frames: Array) -> Array:
    """uint8 pixels 0..255 -> float32 in [-1, 1], any shape.

    Raises:
        ValueError: `frames` is not uint8.
    """
    if frames.dtype != jnp.uint8:
        raise ValueError(f"to_float takes uint8 pixels, got {frames.dtype}")
    return jnp.asarray(frames, jnp.float32) / 255 * 2 - 1


def to_uint8(pixels: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Pixels in [-1, 1] to 0..255: clipped, then truncated (not rounded), as the original saves."""
    unit = (jnp.clip(pixels.astype(jnp.float32), -1.0, 1.0) + 1.0) / 2.0
    return (unit * 255.0).astype(jnp.uint8)


@typechecked
def clip_preprocess(
    images: Float[Array, "b h w c"],
    size: int = 224,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Float[Array, "b s s c"]:
    """Images in [-1, 1] -> the input of a CLIP image tower.

    Resized to `size` x `size` (the aspect ratio is not kept) by `resize_bicubic`, mapped to [0, 1]
    without clipping, then normalised per channel.

    Args:
        images: [b, h, w, c] in [-1, 1], any size.
        size: side of the output.
        mean, std: per channel, of pixels in [0, 1].

    Raises:
        ValueError: `mean` and `std` do not fit the channels.
    """
    channels = images.shape[-1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"mean and std have {len(mean)} and {len(std)} values, the images {channels} channels"
        )
    x = resize_bicubic(images, (size, size))
    return ((x + 1) / 2 - jnp.asarray(mean, x.dtype)) / jnp.asarray(std, x.dtype)


@typechecked
def resize_bicubic(
    images: Float[Array, "b h w c"], size: tuple[int, int], *, antialias: bool = True
) -> Float[Array, "b y x c"]:
    """Bicubic resize (a = -0.75) with aligned corners and clamped edges; the result is not clipped.

    With `antialias`, if a side shrinks by a factor f > 1, a Gaussian blur comes first: per axis
    sigma max((f - 1) / 2, 0.001), int(max(4 sigma, 3)) taps made odd, reflected border (kornia's).

    Args:
        images: [b, h, w, c].
        size: (height, width) of the output.

    Raises:
        ValueError: the images are not floating-point, or a size is not positive.
    """
    _check(images, size)
    factors = [n / m for n, m in zip(images.shape[1:3], size, strict=True)]
    blur = antialias and max(factors) > 1
    return _resize(images, [_bicubic(n, m, blur) for n, m in zip(images.shape[1:3], size)])


@typechecked
def resize_bilinear(
    images: Float[Array, "b h w c"],
    size: tuple[int, int],
    *,
    antialias: bool = False,
    crop: bool = False,
) -> Float[Array, "b y x c"]:
    """Bilinear resize with half-pixel centres, as torchvision's `Resize` on float tensors.

    DiCoDe's demo resizes frames to 256 x 256 this way, without keeping the aspect ratio. The
    torchvision that it pins does not antialias tensors, newer ones do; both are here.

    Args:
        images: [b, h, w, c].
        size: (height, width) of the output.
        antialias: widen the triangle filter on an axis that shrinks.
        crop: of the largest square in the middle, in place of the whole image.

    Raises:
        ValueError: the images are not floating-point, or a size is not positive.
    """
    _check(images, size)
    build, sides = triangle if antialias else bilinear, images.shape[1:3]
    lengths = [min(sides)] * 2 if crop else sides
    parts = [((n - length) / 2, length) for n, length in zip(sides, lengths)]
    return _resize(images, [build(n, m, *part) for n, m, part in zip(sides, size, parts)])


def _check(images, size):
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"resizing takes floating-point images, got {images.dtype}: use to_float")
    if min(size) < 1:
        raise ValueError(f"the output size must be positive, got {size}")
    if 0 in images.shape[1:3]:
        raise ValueError(f"cannot resize images of shape {images.shape}")


def _resize(images, matrices):
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    rows, columns = (jnp.asarray(m, x.dtype) for m in matrices)
    # Highest precision: a bfloat16 or TF32 product would show in the pixels.
    x = jnp.einsum("yh,bhwc->bywc", rows, x, precision="highest")
    return jnp.einsum("xw,bywc->byxc", columns, x, precision="highest").astype(images.dtype)


@functools.lru_cache(maxsize=64)
def _bicubic(n: int, m: int, blur: bool) -> np.ndarray:
    """[m, n] matrix of a bicubic resize from n to m samples, after the blur for that factor."""
    a = -0.75
    # Positions in float32, as in PyTorch: over 500 samples its rounding is visible at 1e-5.
    scale = np.float32(n - 1) / np.float32(m - 1) if m > 1 else np.float32(0)
    position = scale * np.arange(m, dtype=np.float32)
    base = np.floor(position)
    t = (position - base).astype(np.float64)

    def near(x):  # |x| <= 1
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x):  # 1 < |x| < 2
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], axis=1)
    taps = np.clip(base.astype(np.int64)[:, None] + np.arange(-1, 3), 0, n - 1)
    matrix = scatter(weights, taps, n)
    return matrix @ _gaussian_blur(n, n / m) if blur else matrix


def _gaussian_blur(n: int, factor: float) -> np.ndarray:
    """[n, n] matrix of the prefilter for shrinking by `factor`."""
    sigma = max((factor - 1) / 2, 0.001)
    num_taps = int(max(4 * sigma, 3))
    num_taps += 1 - num_taps % 2
    offsets = np.arange(num_taps) - num_taps // 2
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    taps = np.arange(n)[:, None] + offsets
    period = max(2 * (n - 1), 1)
    taps = np.abs(taps) % period  # reflected without repeating the edge
    taps = np.where(taps > n - 1, period - taps, taps)
    return scatter(np.broadcast_to(kernel, taps.shape), taps, n)
