"""How close images and clips come to the true ones."""

import numpy as np
from jaxtyping import UInt8


def psnr(true: UInt8[np.ndarray, "b ..."], other: UInt8[np.ndarray, "b ..."]) -> float:
    """Mean peak signal-to-noise ratio in dB of images or clips [b, ..., h, w, 3]."""
    error = np.asarray(true, np.float64) - np.asarray(other, np.float64)
    mse = np.square(error).mean(axis=tuple(range(1, error.ndim)))
    return float(np.mean(10 * np.log10(255.0**2 / np.maximum(mse, 1e-10))))
