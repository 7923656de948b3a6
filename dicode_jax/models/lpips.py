"""Perceptual distance of images by VGG-16's features (LPIPS, Zhang et al., 2018).

The published heads want images in [-1, 1]; AR-Diffusion gave them [0, 1] by mistake.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.nn.linear import Linear
from dicode_jax.typing import Array, Float, typechecked

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]
SMALLEST = 1e-10


@dataclasses.dataclass(frozen=True, kw_only=True)
class LPIPSConfig:
    """Channels of the convolutions of each block; the defaults are VGG-16's."""

    widths: tuple[tuple[int, ...], ...] = (
        (64,) * 2,
        (128,) * 2,
        (256,) * 3,
        (512,) * 3,
        (512,) * 3,
    )

    def __post_init__(self):
        if not self.widths or not all(self.widths) or min(map(min, self.widths)) < 1:
            raise ValueError(f"widths must be whole numbers above 0, got {self.widths}")


class LPIPS(nnx.Module):
    """Distances of pairs of images, by the blocks of a VGG and a weight for each channel."""

    def __init__(
        self,
        cfg: LPIPSConfig = LPIPSConfig(),
        *,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.cfg = cfg
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        blocks, width = [], 3
        for widths in cfg.widths:
            convs = []
            for out in widths:
                convs.append(nnx.Conv(width, out, kernel_size=(3, 3), padding=1, **options))
                width = out
            blocks.append(nnx.List(convs))
        self.blocks = nnx.List(blocks)
        self.heads = nnx.List([Linear(w[-1], 1, use_bias=False, **options) for w in cfg.widths])

    def features(self, images: Float[Array, "n h w 3"]) -> list[Float[Array, "n y x c"]]:
        """Of each block, before the next one pools them, at length one."""
        x, out = (images - jnp.asarray(SHIFT)) / jnp.asarray(SCALE), []
        for i, convs in enumerate(self.blocks):
            if i:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            for conv in convs:
                x = jax.nn.relu(conv(x))
            squares = jnp.square(x.astype(jnp.float32)).sum(-1, keepdims=True)
            # No plain root: its gradient is infinite where a place is black.
            out.append(x / (jnp.sqrt(jnp.maximum(squares, SMALLEST**2)) + SMALLEST))
        return out

    @typechecked
    def __call__(
        self, images: Float[Array, "n h w 3"], others: Float[Array, "n h w 3"]
    ) -> Float[Array, " n"]:
        """Distances; images of 16 pixels at least in each direction, in [-1, 1]."""
        total = jnp.zeros(len(images))
        pairs = zip(self.heads, self.features(images), self.features(others), strict=True)
        for head, one, other in pairs:
            total += head(jnp.square(one - other))[..., 0].mean((1, 2))
        return total
