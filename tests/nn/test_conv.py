"""Convolutions: the form for CPUs is the convolution itself, and no other platform sees it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.nn.conv import Conv, upsample_nearest
from dicode_jax.runtime.platform import tracing_for

# Sides of the image, kernel, stride, padding; all small enough for the product.
SHAPES = [
    ((1, 1), (3, 3), 1, 1),
    ((2, 2), (3, 3), 1, 1),
    ((1, 4), (3, 3), 1, 1),
    ((2, 1), (3, 3), 1, 1),
    ((3, 1), (3, 1), 1, ((1, 1), (0, 0))),
    ((1, 1), (3, 3), 2, 1),
    ((2, 2), (3, 3), 2, 1),
    ((3, 4), (3, 3), 2, 1),
    ((4, 4), (3, 3), 2, ((0, 1), (0, 1))),
    ((2, 3), (3, 3), 2, ((0, 1), (0, 1))),
    ((2, 2), (5, 3), 1, ((2, 2), (1, 1))),
]


def build(sides, kernel, stride, padding, channels=(5, 7)):
    conv = Conv(*channels, kernel, strides=stride, padding=padding, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(float(channels[1]))
    return conv, jax.random.normal(jax.random.key(1), (3, 2, *sides, channels[0]))


def convolved(x, kernel, bias, stride, padding):
    pads = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[-3:]),
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = y + bias.reshape(1, 1, 1, -1)
    return y.reshape(*x.shape[:-3], *y.shape[1:])


def called(conv, call=Conv.__call__):
    """The convolution as a function of the images, its kernel and its bias."""
    graph, state = nnx.split(conv)

    def run(x, kernel, bias):
        leaves = jax.tree.unflatten(jax.tree.structure(state), (bias, kernel))
        return call(nnx.merge(graph, leaves), x)

    return run


def with_gradients(conv, x, *functions):
    """Pairs of results of two functions, and of their gradients by all arguments."""
    args = x, conv.kernel[...], conv.bias[...]
    weights = jax.random.normal(jax.random.key(2), jax.eval_shape(functions[1], *args).shape)

    @jax.jit
    def both(*args):
        results = [jax.vjp(f, *args) for f in functions]
        return [(y, *pull(weights)) for y, pull in results]

    return zip(*both(*args), strict=True)


def primitives(conv, x):
    graph, state = nnx.split(conv)
    return str(jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, x))


@pytest.mark.parametrize(("sides", "kernel", "stride", "padding"), SHAPES)
def test_the_product_is_the_convolution_with_its_gradient(sides, kernel, stride, padding):
    conv, x = build(sides, kernel, stride, padding)
    assert "conv_general_dilated" not in primitives(conv, x)
    ours = called(conv)

    def theirs(*args):
        return convolved(*args, stride, padding)

    for got, want in with_gradients(conv, x, ours, theirs):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("sides", "channels", "is_product"),
    [
        ((2, 2), (1, 1), True),
        ((1, 5), (99, 99), False),
        ((1, 5), (100, 100), True),
        ((4, 4), (320, 320), True),
        ((4, 4), (320, 256), False),
        ((8, 8), (1280, 1280), True),
        ((8, 8), (640, 640), False),
        ((16, 16), (127, 127), False),
    ],
)
def test_the_product_is_for_few_pixels_and_many_channels(sides, channels, is_product):
    conv = nnx.eval_shape(lambda: Conv(*channels, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2, *sides, channels[0]), jnp.float32)
    assert ("conv_general_dilated" not in primitives(conv, x)) == is_product


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("sides", [(4, 4), (6, 10)])
def test_tiles_are_the_convolution_with_its_gradient(sides, doubled):
    if doubled:
        sides = tuple(side - 1 for side in sides)  # odd too: twice as many are even
    conv, x = build(sides, (3, 3), 1, 1, (128, 132))
    ours = called(conv, Conv.of_doubled if doubled else Conv.__call__)

    def theirs(x, *args):
        return convolved(upsample_nearest(x) if doubled else x, *args, 1, 1)

    assert "conv_general_dilated" not in str(
        jax.make_jaxpr(ours)(x, conv.kernel[...], conv.bias[...])
    )
    for got, want in with_gradients(conv, x, ours, theirs):
        np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    ("shape", "channels", "is_tiled"),
    [
        ((16, 8, 8), (96, 160), False),  # few channels
        ((16, 8, 8), (96, 192), True),
        ((16, 7, 8), (192, 192), False),  # odd
        ((1, 8, 8), (1280, 1280), False),  # 16 tiles, for which the sums of the kernel cost more
        ((16, 8, 8), (1280, 1280), True),
        ((1, 256, 256), (128, 128), False),  # sums of large images
        ((1, 128, 128), (256, 256), True),
    ],
)
def test_tiles_are_for_many_channels_and_neither_few_nor_too_many_pixels(shape, channels, is_tiled):
    conv = nnx.eval_shape(lambda: Conv(*channels, rngs=nnx.Rngs(0)))
    traced = primitives(conv, jax.ShapeDtypeStruct((*shape, channels[0]), jnp.float32))
    assert ("optimization_barrier" in traced) == is_tiled


def test_pairs_along_height_are_the_convolution_with_its_gradient():
    pads = ((1, 1), (0, 0))
    conv, x = build((4, 9), (3, 1), 1, pads, (256, 260))
    ours = called(conv)
    assert "conv_general_dilated" not in str(
        jax.make_jaxpr(ours)(x, conv.kernel[...], conv.bias[...])
    )
    for got, want in with_gradients(conv, x, ours, lambda *args: convolved(*args, 1, pads)):
        np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    ("shape", "channels", "is_paired"),
    [((1, 16, 64), 256, True), ((1, 16, 64), 240, False), ((1, 15, 64), 256, False)],
)
def test_pairs_are_for_many_channels_and_an_even_height(shape, channels, is_paired):
    make = lambda: Conv(channels, channels, (3, 1), padding=((1, 1), (0, 0)), rngs=nnx.Rngs(0))  # noqa: E731
    x = jax.ShapeDtypeStruct((*shape, channels), jnp.float32)
    traced = primitives(nnx.eval_shape(make), x)
    assert ("conv_general_dilated" not in traced) == is_paired


def test_a_doubled_image_is_not_made_where_tiles_pay():
    conv = nnx.eval_shape(lambda: Conv(256, 256, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(conv)
    x = jax.ShapeDtypeStruct((1, 128, 128, 256), jnp.float32)
    made = jax.make_jaxpr(lambda s, x: nnx.merge(graph, s).of_doubled(x))
    assert "conv_general_dilated" not in str(made(state, x))
    with tracing_for(platform="gpu"):
        assert "conv_general_dilated" in str(made(state, x))


@pytest.mark.parametrize("sides", [(4, 4), (3, 5), (1, 1)])
def test_a_doubled_image_is_convolved_in_phases_on_gpus(sides):
    conv, x = build(sides, (3, 3), 1, 1)
    ours = called(conv, Conv.of_doubled)

    def theirs(x, *args):
        return convolved(upsample_nearest(x), *args, 1, 1)

    with tracing_for(platform="gpu"):
        traced = str(jax.make_jaxpr(ours)(x, conv.kernel[...], conv.bias[...]))
        found = with_gradients(conv, x, ours, theirs)
    assert traced.count("conv_general_dilated[") == 4
    for got, want in found:
        np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


def test_elsewhere_and_in_other_types_it_is_one_convolution():
    x = jnp.ones((2, 1, 1, 5))
    with tracing_for(platform="gpu"):
        traced = primitives(build((1, 1), (3, 3), 1, 1)[0], x)
    assert traced.count("conv_general_dilated") == 1
    assert "dot_general" not in traced
    half = Conv(5, 7, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert "conv_general_dilated" in primitives(half, x)
    assert "conv_general_dilated" not in primitives(Conv(5, 7, rngs=nnx.Rngs(0)), x)
