"""Numbers of quality against closed forms."""

import numpy as np

from dicode_jax.evaluation.quality import psnr


def test_psnr_is_the_mean_of_the_decibels_of_each_image():
    true = np.zeros((2, 3, 4, 5, 3), np.uint8)
    other = true.copy()
    other[0], other[1, 0] = 51, 255  # squared errors of (255 / 5)^2 and 255^2 / 3
    wanted = (20 * np.log10(5) + 10 * np.log10(3)) / 2
    np.testing.assert_allclose(psnr(true, other), wanted, rtol=1e-12)
    assert psnr(true, true) > 100
