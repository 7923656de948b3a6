"""Convolutions over time that see no later frame, and what they carry from chunk to chunk.

As in CogVideoX's autoencoder (arXiv 2408.06072): in front of the first chunk stands its first frame
again and again; in front of a later one the end of what the convolution saw before.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.runtime.platform import platform
from dicode_jax.typing import Array, Float

fan_in = nnx.initializers.lecun_normal()


class Past:
    """What the convolutions of a network saw last, handed out and renewed as they run in turn.

    Made for one chunk: `left` is what the next chunk gets.

    Args:
      frames: `left` of the chunk before; None for the first.
    """

    def __init__(self, frames: Sequence[Array] | None = None):
        self._frames = None if frames is None else iter(frames)
        self._left: list[Array] = []

    @property
    def left(self) -> tuple[Array, ...]:
        """For each convolution the last frames of its padded input, `[b, places - 1, h, w, c]`."""
        return tuple(self._left)

    def before(self, x: Float[Array, "b f h w c"], count: int) -> Float[Array, "b g h w c"]:
        """`x` behind `count` frames of the chunk before, or behind copies of its own first."""
        if self._frames is None:
            b, _, *rest = x.shape
            first = jnp.broadcast_to(x[:, :1], (b, count, *rest))
        else:
            first = next(self._frames)
        x = jnp.concatenate([first, x], axis=1)
        self._left.append(x[:, -count:])
        return x


class CausalConv(nnx.Module):
    """A convolution over time, height and width, `places` along each, causal in time.

    On CPUs it runs as a sum of two-dimensional ones, as XLA has no fast one of three there: 8
    frames of 64x64 pixels and 32 channels took 1,130 ms on a busy machine and 260 so, with the
    gradient 7,200 and 1,000.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        places: int = 3,
        *,
        kernel_init=fan_in,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.places, self.dtype = places, dtype
        shape = (places, places, places, in_features, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype))

    def __call__(self, x: Float[Array, "b f h w c"], past: Past) -> Float[Array, "b f h w o"]:
        """Convolves every frame with those before it."""
        dtype = self.dtype or x.dtype
        kernel, bias = (value[...].astype(dtype) for value in (self.kernel, self.bias))
        x = past.before(x.astype(dtype), self.places - 1)
        side = (self.places // 2, self.places // 2)
        if platform() == "cpu":
            y = _sum(x, kernel, side)
        else:
            form = ("NDHWC", "DHWIO", "NDHWC")
            pads = ((0, 0), side, side)
            y = jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), pads, dimension_numbers=form)
        return y + bias[(None,) * 4]


def _sum(x: Array, kernel: Array, side: tuple[int, int]) -> Array:
    """One convolution of images for each place of the kernel along time."""
    f = x.shape[1] - len(kernel) + 1
    form = ("NHWC", "HWIO", "NHWC")

    def convolved(place: int) -> Array:
        images = rearrange(x[:, place : place + f], "b f h w c -> (b f) h w c")
        return jax.lax.conv_general_dilated(
            images, kernel[place], (1, 1), (side, side), dimension_numbers=form
        )

    y = functools.reduce(jnp.add, map(convolved, range(len(kernel))))
    return rearrange(y, "(b f) h w c -> b f h w c", f=f)
