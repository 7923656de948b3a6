"""Pixel transforms: closed forms, identities, and PyTorch's own resize where it is installed."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.media.resize import bilinear, resize_square, triangle
from dicode_jax.media.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    clip_preprocess,
    resize_bicubic,
    resize_bilinear,
    to_float,
)

RESIZES = {
    "bicubic": resize_bicubic,
    "bilinear": resize_bilinear,
    "antialiased": lambda x, size: resize_bilinear(x, size, antialias=True),
}


def noise(h, w, b=2, c=3, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (b, h, w, c)), jnp.float32)


def test_to_float_maps_bytes_to_minus_one_and_one():
    np.testing.assert_allclose(to_float(jnp.asarray([0, 51, 255], jnp.uint8)), [-1, -0.6, 1])
    with pytest.raises(ValueError, match="takes uint8 pixels, got int32"):
        to_float(jnp.zeros((2,), jnp.int32))


@pytest.mark.parametrize("name", RESIZES)
def test_same_size_is_the_identity(name):
    x = noise(7, 5)
    np.testing.assert_allclose(RESIZES[name](x, (7, 5)), x, atol=1e-6)


@pytest.mark.parametrize("name", RESIZES)
@pytest.mark.parametrize("size", [(3, 4), (29, 5), (14, 1)])
def test_a_constant_stays_constant(name, size):
    x = jnp.full((1, 17, 11, 2), 0.3)
    np.testing.assert_allclose(RESIZES[name](x, size), 0.3, atol=1e-6)


def test_axes_are_resized_apart():
    x = noise(6, 9)
    for resize in (resize_bilinear, resize_bicubic):
        a = resize(x, (11, 13))
        b = resize(x.swapaxes(1, 2), (13, 11)).swapaxes(1, 2)
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_bicubic_keeps_the_corners_when_it_grows():
    x = noise(5, 6)
    y = resize_bicubic(x, (12, 17))
    np.testing.assert_allclose(y[:, [0, 0, -1, -1], [0, -1, 0, -1]],
                               x[:, [0, 0, -1, -1], [0, -1, 0, -1]], atol=1e-6)  # fmt: skip


def test_bicubic_halfway_weights_are_those_of_a_minus_three_quarters():
    x = jnp.eye(5)[:, :, None, None]  # five images of five rows, each one row white
    y = resize_bicubic(x, (9, 1))[:, 3, 0, 0]  # row 3 of 9 is at 1.5
    np.testing.assert_allclose(y, [-0.09375, 0.59375, 0.59375, -0.09375, 0], atol=1e-6)


def test_bicubic_blurs_only_when_it_shrinks():
    x = noise(40, 40)
    differ = {
        size: float(
            jnp.abs(resize_bicubic(x, size) - resize_bicubic(x, size, antialias=False)).max()
        )
        for size in ((40, 50), (40, 10))
    }
    assert differ[40, 50] == 0
    assert differ[40, 10] > 0.1


def test_bilinear_weights_of_halving():
    x = jnp.eye(4)[:, :, None, None]
    plain = resize_bilinear(x, (2, 1))[:, 0, 0, 0]
    np.testing.assert_allclose(plain, [0.5, 0.5, 0, 0], atol=1e-6)
    wide = resize_bilinear(x, (2, 1), antialias=True)[:, 0, 0, 0]
    np.testing.assert_allclose(wide, np.array([3, 3, 1, 0]) / 7, atol=1e-6)


def test_clip_preprocess_normalises_without_clipping():
    values = jnp.asarray([-1.0, 0.2, 1.0])[:, None, None, None] * jnp.ones((3, 10, 12, 3))
    y = clip_preprocess(values, 16)
    assert y.shape == (3, 16, 16, 3)
    want = (np.array([[0.0], [0.6], [1.0]]) - CLIP_MEAN) / CLIP_STD
    np.testing.assert_allclose(y[:, 8, 3], want, atol=1e-5)
    step = jnp.where(jnp.arange(10) < 5, -1.0, 1.0)[None, None, :, None]
    y = clip_preprocess(jnp.broadcast_to(step, (1, 10, 10, 3)), 33)
    assert y[..., 0].max() > (1 - CLIP_MEAN[0]) / CLIP_STD[0] + 0.05  # bicubic overshoots


def test_works_under_jit_and_in_low_precision():
    x = noise(20, 30)
    want = clip_preprocess(x, 14)
    np.testing.assert_allclose(jax.jit(lambda x: clip_preprocess(x, 14))(x), want, atol=1e-5)
    low = clip_preprocess(x.astype(jnp.bfloat16), 14)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), want, atol=0.05)  # 8 bits


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match=r"size must be positive, got \(0, 3\)"):
        resize_bilinear(noise(4, 4), (0, 3))
    with pytest.raises(ValueError, match=r"cannot resize images of shape \(1, 0, 4, 3\)"):
        resize_bicubic(jnp.zeros((1, 0, 4, 3)), (2, 2))
    with pytest.raises(ValueError, match="3 and 3 values, the images 1 channels"):
        clip_preprocess(noise(4, 4, c=1), 8)
    unchecked = resize_bilinear.__wrapped__
    with pytest.raises(ValueError, match="floating-point images, got uint8: use to_float"):
        unchecked(jnp.zeros((1, 4, 4, 3), jnp.uint8), (2, 2))


SIZES = [(50, 70, 32, 32), (9, 200, 24, 31), (256, 320, 224, 224), (5, 3, 40, 7), (2, 640, 64, 64)]


@pytest.mark.torch
@pytest.mark.parametrize(("h", "w", "out_h", "out_w"), SIZES)
def test_bilinear_matches_torch(h, w, out_h, out_w):
    torch = pytest.importorskip("torch")
    x = noise(h, w, b=1)
    for antialias in (False, True):
        want = torch.nn.functional.interpolate(
            torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy()),
            size=(out_h, out_w),
            mode="bilinear",
            antialias=antialias,
        )
        got = resize_bilinear(x, (out_h, out_w), antialias=antialias)
        np.testing.assert_allclose(got, np.moveaxis(want.numpy(), 1, -1), atol=2e-6)


@pytest.mark.torch
@pytest.mark.parametrize(("h", "w", "out_h", "out_w"), SIZES)
def test_bicubic_matches_blur_and_interpolation_in_torch(h, w, out_h, out_w):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x = noise(h, w, b=1)
    y = torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())
    if h > out_h or w > out_w:  # the prefilter, axis by axis, as a convolution
        for axis, factor in ((2, h / out_h), (3, w / out_w)):
            sigma = max((factor - 1) / 2, 0.001)
            taps = int(max(4 * sigma, 3))
            taps += taps % 2 == 0
            at = torch.arange(taps, dtype=torch.float32) - taps // 2
            kernel = torch.exp(-(at**2) / (2 * sigma**2))
            kernel = (kernel / kernel.sum()).view(1, 1, *((-1, 1) if axis == 2 else (1, -1)))
            half = taps // 2
            pad = (0, 0, half, half) if axis == 2 else (half, half, 0, 0)
            y = functional.pad(y, pad, mode="reflect")
            y = functional.conv2d(y, kernel.expand(3, -1, -1, -1), groups=3)
    want = functional.interpolate(y, size=(out_h, out_w), mode="bicubic", align_corners=True)
    got = resize_bicubic(x, (out_h, out_w))
    np.testing.assert_allclose(got, np.moveaxis(want.numpy(), 1, -1), atol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("h", "w"), [(48, 64), (5, 900), (1, 1), (300, 7)])
def test_a_square_is_the_product_with_both_matrices(antialias, h, w):
    image = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    side = min(h, w)
    build = triangle if antialias else bilinear
    for width, left in ((w, 0), (side, 0.3 * (w - side))):
        got = resize_square(image, 16, (left, 0, left + width, h), antialias=antialias)
        rows, columns = build(h, 16, 0, h), build(w, 16, left, width)
        want = np.einsum("yh,xw,hwc->yxc", rows, columns, image)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("antialias", [False, True])
def test_a_large_image_is_not_copied_to_be_shrunk(antialias):
    image = np.zeros((2000, 2000, 3), np.uint8)  # 12 MB, in floats 48
    tracemalloc.start()
    try:
        resize_square(image, 64, (0, 0, 2000, 2000), antialias=antialias)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8e6
