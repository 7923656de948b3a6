"""Numbers of quality against closed forms."""

import numpy as np
import pytest

from dicode_jax.evaluation.quality import psnr, ssim


def test_psnr_is_the_mean_of_the_decibels_of_each_image():
    true = np.zeros((2, 3, 4, 5, 3), np.uint8)
    other = true.copy()
    other[0], other[1, 0] = 51, 255  # squared errors of (255 / 5)^2 and 255^2 / 3
    wanted = (20 * np.log10(5) + 10 * np.log10(3)) / 2
    np.testing.assert_allclose(psnr(true, other), wanted, rtol=1e-12)
    assert psnr(true, true) > 100


def test_ssim_is_its_closed_form_on_flat_images_and_1_on_equal_ones():
    flat = [np.full((1, 2, 12, 13, 3), level, np.uint8) for level in (50, 150)]
    c1 = (0.01 * 255) ** 2
    wanted = (2 * 50 * 150 + c1) / (50**2 + 150**2 + c1)
    np.testing.assert_allclose(ssim(*flat), wanted, rtol=1e-12)
    noise = np.random.default_rng(0).integers(0, 256, flat[0].shape, np.uint8)
    np.testing.assert_allclose(ssim(noise, noise), 1.0, rtol=1e-12)
    assert ssim(noise, 255 - noise) < -0.5  # the same structure, turned about
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(noise[..., :10, :, :], noise[..., :10, :, :])


def test_ssim_of_one_window_is_its_definition():
    x, y = np.random.default_rng(0).integers(0, 256, (2, 11, 11, 3), np.uint8).astype(np.float64)
    away = np.hypot(*np.mgrid[-5:6, -5:6])
    weights = np.exp(-(away**2) / (2 * 1.5**2))[..., None]
    mean = lambda values: (weights * values).sum((0, 1)) / weights.sum()  # noqa: E731
    mx, my = mean(x), mean(y)
    vx, vy, both = mean((x - mx) ** 2), mean((y - my) ** 2), mean((x - mx) * (y - my))
    wanted = (2 * mx * my + 6.5025) / (mx**2 + my**2 + 6.5025)  # (0.01 x 255)^2
    wanted *= (2 * both + 58.5225) / (vx + vy + 58.5225)  # (0.03 x 255)^2
    found = ssim(x[None].astype(np.uint8), y[None].astype(np.uint8))
    np.testing.assert_allclose(found, wanted.mean(), rtol=1e-9)
