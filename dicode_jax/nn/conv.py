"""A 2-D convolution in the form that suits the platform: all those of UNet and autoencoder.

XLA's convolution for CPUs is lost where images have few pixels: 3x3 on 16 images of 2x2 pixels and
1280 channels took 2,900 ms on two cores, with the gradient 4,900. Shifted images side by side and
one matrix product took 15 and 60 ms. With more pixels and many channels fewer products pay: 3x3 on
16 images of 16x16 pixels and 640 channels took 152 ms, with the gradient 499, and 86 and 307 as
`winograd` has it; behind a doubling 807 and 201.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.nn import winograd
from dicode_jax.runtime.platform import platform
from dicode_jax.typing import Array, Float, typechecked

# Where the product pays on CPUs: up to so many pixels of the result always, and with so many
# channels for each of its pixels (320 at 4x4, 1280 at 8x8).
PRODUCT_MAX_PIXELS = 4
PRODUCT_CHANNELS_PER_PIXEL = 20
# Where fewer products pay there: with so many channels (from 64 on they run a tenth sooner, but
# the packaged model then compiled for four seconds more), for each of which an image has at most
# so many pixels (sums of larger ones cost what is won), and a batch a tenth of a tile or more (with
# fewer the sums of the kernel do).
WINOGRAD_MIN_CHANNELS = 128
WINOGRAD_PIXELS_PER_CHANNEL = 128
WINOGRAD_TILES_PER_CHANNEL = 0.1
WINOGRAD_MIN_CHANNELS_OF_PAIRS = 256  # along one axis, which saves a third alone

Pairs = tuple[tuple[int, int], tuple[int, int]]


@typechecked
def upsample_nearest(x: Float[Array, "*n h w c"]) -> Float[Array, "*n h2 w2 c"]:
    """Doubles height and width by repeating pixels."""
    *lead, h, w, c = x.shape
    x = jnp.broadcast_to(x[..., :, None, :, None, :], (*lead, h, 2, w, 2, c))
    return x.reshape(*lead, 2 * h, 2 * w, c)


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
        self.phases: nnx.List | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*n h w c"]) -> Float[Array, "*n y x o"]:
        """Convolves every image."""
        height, width = map(self._size, x.shape[-3:-1], self.places, self.pads)
        if not self._may_differ(x):
            return super().__call__(x)
        few = height * width <= PRODUCT_MAX_PIXELS
        if not few and not (height % 2 or width % 2) and self._has_tiles(x, height * width / 4):
            return self._winograd(x, winograd.convolve)
        if not few and not height % 2 and self._has_pairs(x, height * width / 2):
            return self._winograd(x, winograd.convolve_columns)
        wide = self._channels >= PRODUCT_CHANNELS_PER_PIXEL * height * width
        return self._product(x, height, width) if few or wide else super().__call__(x)

    def of_doubled(self, x: Float[Array, "*n h w c"]) -> Float[Array, "*n y x o"]:
        """Convolves every image after its height and width are doubled by nearest neighbours."""
        if self._may_differ(x) and self._has_tiles(x, math.prod(x.shape[-3:-1])):
            return self._winograd(x, winograd.convolve_doubled)
        return self._in_phases(x) if self._has_phases else self(upsample_nearest(x))

    @property
    def _has_phases(self) -> bool:
        return platform() == "gpu" and self._is_same

    @property
    def _is_same(self) -> bool:
        """Whether it is one of three by three that keeps the size."""
        return self.places == (3, 3) and self.stride == 1 and self.pads == ((1, 1), (1, 1))

    @property
    def _channels(self) -> float:
        return math.sqrt(self.in_features * self.out_features)

    def _may_differ(self, x: Array) -> bool:
        """Whether another form than XLA's may be taken: in float32 on CPUs."""
        return platform() == "cpu" and (self.dtype or x.dtype) == jnp.float32

    def _has_tiles(self, x: Array, tiles: float) -> bool:
        """Whether it is one of three by three, and so many tiles of an image pay."""
        *lead, height, width, _ = x.shape
        return (
            self._is_same
            and self._channels >= WINOGRAD_MIN_CHANNELS
            and height * width <= WINOGRAD_PIXELS_PER_CHANNEL * self._channels
            and math.prod(lead) * tiles >= WINOGRAD_TILES_PER_CHANNEL * self._channels
        )

    def _has_pairs(self, x: Array, pairs: float) -> bool:
        """Whether it is one of three along height, and so many pairs of results of an image pay."""
        same = self.places == (3, 1) and self.stride == 1 and self.pads == ((1, 1), (0, 0))
        enough = math.prod(x.shape[:-3]) * pairs >= WINOGRAD_TILES_PER_CHANNEL * self._channels
        return same and self._channels >= WINOGRAD_MIN_CHANNELS_OF_PAIRS and enough

    def keep_phases(self) -> None:
        """Makes the kernels for doubled images now, where there are any, for calls in a loop."""
        if self._has_phases:
            self.phases = nnx.List(map(nnx.Param, self._phases()))

    def _phases(self) -> list[Array]:
        """Kernels [2, 2, c, o] of even rows and columns, then odd columns, then odd rows.

        An even row of a doubled image's convolution sees one row of the image by its first place
        and the next by both others.
        """

        def halves(kernel: Array, axis: int) -> tuple[Array, Array]:
            first, middle, last = jnp.unstack(kernel, axis=axis)
            pairs = (first, middle + last), (first + middle, last)
            even, odd = (jnp.stack(pair, axis) for pair in pairs)
            return even, odd

        kernel = self.kernel[...]
        rows = halves(kernel.astype(jnp.float32), 0)
        return [x.astype(self.dtype or kernel.dtype) for row in rows for x in halves(row, 1)]

    def _in_phases(self, x: Array) -> Array:
        """The doubled image is not made: of three places in a row two see the same pixel.

        So even and odd rows and columns of the result are convolutions of the image by 2x2, with 16
        products where the doubled one has 36.
        """
        assert self.bias is not None  # `use_bias` is left to its default
        images = x.reshape(-1, *x.shape[-3:])
        _, h, w, _ = images.shape
        kernels = self._phases() if self.phases is None else [x[...] for x in self.phases]
        images, bias, *kernels = self.promote_dtype(
            (images, self.bias[...], *kernels), dtype=self.dtype
        )

        def convolved(i: int, j: int) -> Array:
            pads = ((1 - i, i), (1 - j, j))
            order = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(
                images, kernels[2 * i + j], (1, 1), pads, dimension_numbers=order
            )
            return y + bias[None, None, None]

        rows = [jnp.stack([convolved(i, j) for j in (0, 1)], axis=3) for i in (0, 1)]
        y = jnp.stack(rows, axis=2)
        return y.reshape(*x.shape[:-3], 2 * h, 2 * w, self.out_features)

    def _winograd(self, x: Array, form: Callable[[Array, Array], Array]) -> Array:
        assert self.bias is not None  # `use_bias` is left to its default
        x, kernel, bias = self.promote_dtype(
            (x, self.kernel[...], self.bias[...]), dtype=self.dtype
        )
        y = form(x.reshape(-1, *x.shape[-3:]), kernel)
        return (y + bias[None, None, None]).reshape(*x.shape[:-3], *y.shape[1:])

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
