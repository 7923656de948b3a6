"""A 2-D convolution in the form that suits the platform: all those of UNet and autoencoder.

XLA's convolution for CPUs is lost where images have few pixels: 3x3 on 16 images of 2x2 pixels and
1280 channels took 2,900 ms on two cores, with the gradient 4,900. Shifted images side by side and
one matrix product took 15 and 60 ms.
"""

import math

import jax.numpy as jnp
from flax import nnx

from dicode_jax.runtime.platform import platform
from dicode_jax.typing import Array, Float

# Where the product pays on CPUs: up to so many pixels of the result always, and with so many
# channels for each of its pixels (320 at 4x4, 1280 at 8x8).
PRODUCT_MAX_PIXELS = 4
PRODUCT_CHANNELS_PER_PIXEL = 20

Pairs = tuple[tuple[int, int], tuple[int, int]]


class Conv(nnx.Conv):
    """`nnx.Conv` over the two axes before the channels, with the same parameters.

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        kernel_size: places along height and width.
        strides: of both axes.
        padding: zeros before and after each of both axes; an int for all four.
        options: initializers, `dtype` and `param_dtype`, `rngs`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: tuple[int, int] = (3, 3),
        *,
        strides: int = 1,
        padding: int | Pairs = 1,
        rngs: nnx.Rngs,
        **options,
    ):
        pads = ((padding, padding),) * 2 if isinstance(padding, int) else padding
        super().__init__(
            in_features, out_features, kernel_size, strides, padding=pads, rngs=rngs, **options
        )
        self.places, self.stride, self.pads = kernel_size, strides, pads

    def __call__(self, x: Float[Array, "*n h w c"]) -> Float[Array, "*n y x o"]:
        """Convolves every image."""
        height, width = map(self._size, x.shape[-3:-1], self.places, self.pads)
        channels = math.sqrt(self.in_features * self.out_features)
        few = height * width <= PRODUCT_MAX_PIXELS
        wide = channels >= PRODUCT_CHANNELS_PER_PIXEL * height * width
        is_float32 = (self.dtype or x.dtype) == jnp.float32
        if platform() == "cpu" and is_float32 and (few or wide):
            return self._product(x, height, width)
        return super().__call__(x)

    def _size(self, size: int, places: int, pads: tuple[int, int]) -> int:
        """Rows or columns of the result."""
        return (size + sum(pads) - places) // self.stride + 1

    def _product(self, x: Array, height: int, width: int) -> Array:
        """Every place of the kernel takes a shifted image; those that see zeros alone are left out.

        At 1x1 that leaves one of nine.
        """
        *lead, h, w, c = x.shape
        assert self.bias is not None  # `use_bias` is left to its default
        x, kernel, bias = self.promote_dtype(
            (x, self.kernel[...], self.bias[...]), dtype=self.dtype
        )
        (top, _), (left, _) = self.pads
        rows = self._meeting(self.places[0], height, top, h)
        columns = self._meeting(self.places[1], width, left, w)
        x = jnp.pad(x.reshape(-1, h, w, c), ((0, 0), *self.pads, (0, 0)))
        s = self.stride
        shifted = [
            x[:, i : i + s * (height - 1) + 1 : s, j : j + s * (width - 1) + 1 : s]
            for i in rows
            for j in columns
        ]
        kernel = kernel[rows.start : rows.stop, columns.start : columns.stop]
        y = jnp.concatenate(shifted, -1).reshape(-1, len(shifted) * c)
        y = y @ kernel.reshape(len(shifted) * c, self.out_features) + bias[None]
        return y.reshape(*lead, height, width, self.out_features)

    def _meeting(self, places: int, size: int, before: int, extent: int) -> range:
        """Of the kernel along one axis, those that meet the image."""
        last = self.stride * (size - 1)
        first = max(0, before - last)
        return range(first, max(first, min(places, before + extent)))
