"""How close images and clips come to the true ones."""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8


def squared_errors(
    true: UInt8[np.ndarray, "b ..."], other: UInt8[np.ndarray, "b ..."]
) -> Float[np.ndarray, " b"]:
    """Mean squared error of each image or clip of [b, ..., h, w, 3], of pixels in 0..255."""
    error = np.asarray(true, np.float64) - np.asarray(other, np.float64)
    return np.square(error).mean(axis=tuple(range(1, error.ndim)))


def decibels(mse: Float[np.ndarray, "*n"] | float) -> Any:
    """Peak signal-to-noise ratio of mean squared errors of pixels in 0..255."""
    return 10 * np.log10(255.0**2 / np.maximum(mse, 1e-10))


def psnr(true: UInt8[np.ndarray, "b ..."], other: UInt8[np.ndarray, "b ..."]) -> float:
    """Mean peak signal-to-noise ratio in dB of images or clips [b, ..., h, w, 3]."""
    return float(np.mean(decibels(squared_errors(true, other))))


def ssim(true: UInt8[np.ndarray, "b ... h w 3"], other: UInt8[np.ndarray, "b ... h w 3"]) -> float:
    """Mean structural similarity of images or clips [b, ..., h, w, 3], 1 for equal ones."""
    return float(similarities(true, other).mean())


def similarities(
    true: UInt8[np.ndarray, "*b h w 3"], other: UInt8[np.ndarray, "*b h w 3"]
) -> Float[np.ndarray, "*b"]:
    """Structural similarity of each image, 1 for equal ones.

    Wang et al., 2004, doi 10.1109/TIP.2003.819861: a Gaussian window of 11 x 11 pixels with a
    deviation of 1.5, only where it fits whole; every channel by itself.

    Raises:
      ValueError: Images are smaller than the window.
    """
    if min(true.shape[-3:-1]) < 11:
        raise ValueError(f"ssim needs images of 11 x 11 pixels or more, got {true.shape}")
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights /= weights.sum()

    def blurred(x: np.ndarray) -> np.ndarray:
        for axis in (-3, -2):
            windows = np.lib.stride_tricks.sliding_window_view(x, 11, axis=axis)
            x = windows @ weights
        return x

    x, y = (np.asarray(images, np.float64) for images in (true, other))
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return similarity.mean((-3, -2, -1))
