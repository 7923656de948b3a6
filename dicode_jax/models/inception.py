"""Inception-v3 as FID looks at images with it: TensorFlow's network of 2015, up to its last pool.

Szegedy et al., arXiv 1512.00567; the differences from later ports are those of `pytorch-fid`:
averages leave out the padding, and the last block pools by the maximum. Letters: b images, h and w
pixels, c channels.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from dicode_jax.nn.conv_norm import ConvNorm
from dicode_jax.typing import Array, Float, typechecked

Kernel = tuple[int, int]
Step = Sequence[tuple[int, Kernel]]  # channels and kernel of a unit, or of two side by side
Branches = Mapping[str, Sequence[Step]]
Pool = Literal["average", "max", "halve"]

ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)
FORK = ((384, (1, 3)), (384, (3, 1)))


def _chain(*units: tuple[int, Kernel]) -> list[Step]:
    return [(unit,) for unit in units]


def _a(pooled: int) -> Branches:
    return {
        "branch1x1": _chain((64, ONE)),
        "branch5x5": _chain((48, ONE), (64, FIVE)),
        "branch3x3dbl": _chain((64, ONE), (96, THREE), (96, THREE)),
        "branch_pool": _chain((pooled, ONE)),
    }


def _c(width: int) -> Branches:
    return {
        "branch1x1": _chain((192, ONE)),
        "branch7x7": _chain((width, ONE), (width, ROW), (192, COLUMN)),
        "branch7x7dbl": _chain(
            (width, ONE), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)
        ),
        "branch_pool": _chain((192, ONE)),
    }


_B: Branches = {
    "branch3x3": _chain((384, THREE)),
    "branch3x3dbl": _chain((64, ONE), (96, THREE), (96, THREE)),
    "branch_pool": [],
}
_D: Branches = {
    "branch3x3": _chain((192, ONE), (320, THREE)),
    "branch7x7x3": _chain((192, ONE), (192, ROW), (192, COLUMN), (192, THREE)),
    "branch_pool": [],
}
_E: Branches = {
    "branch1x1": _chain((320, ONE)),
    "branch3x3": [*_chain((384, ONE)), FORK],
    "branch3x3dbl": [*_chain((448, ONE), (384, THREE)), FORK],
    "branch_pool": _chain((192, ONE)),
}
MIXED: dict[str, tuple[Branches, Pool]] = {
    "5b": (_a(32), "average"),
    "5c": (_a(64), "average"),
    "5d": (_a(64), "average"),
    "6a": (_B, "halve"),
    "6b": (_c(128), "average"),
    "6c": (_c(160), "average"),
    "6d": (_c(160), "average"),
    "6e": (_c(192), "average"),
    "7a": (_D, "halve"),
    "7b": (_E, "average"),
    "7c": (_E, "max"),
}
"""Block -> its branches in the order of their channels, and what its pooling does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """Sizes; the default is the published network.

    Attributes:
        divisor: of all channels, 1, 2, 4, 8 or 16; above 1 it is another, narrower network.
    """

    divisor: int = 1

    def __post_init__(self):
        if self.divisor not in (1, 2, 4, 8, 16):
            raise ValueError(f"divisor must be 1, 2, 4, 8 or 16, got {self.divisor}")


class Mixed(nnx.Module):
    """Branches side by side; one that halves does so in the last unit of each."""

    def __init__(self, in_features: int, branches: Branches, pool: Pool, unit, divisor: int):
        self.pool, named, self.width = pool, [], 0
        for branch, steps in branches.items():
            width, names = in_features, []
            for i, step in enumerate(steps):
                is_last = i == len(steps) - 1
                how = {"strides": 2, "padding": "VALID"} if pool == "halve" and is_last else {}
                number = f"_{i + 1}" if len(steps) > 1 else ""
                letters = ("a", "b") if len(step) > 1 else ("",)
                row = [f"{branch}{number}{letter}" for letter in letters]
                for name, (channels, kernel) in zip(row, step, strict=True):
                    setattr(self, name, unit(width, channels // divisor, kernel, **how))
                names.append(tuple(row))
                width = sum(channels for channels, _ in step) // divisor
            named.append((branch, tuple(names)))
            self.width += width
        self.branches = tuple(named)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b y x o"]:
        parts = []
        for branch, steps in self.branches:
            part = self._pooled(x) if branch == "branch_pool" else x
            for names in steps:
                units: list[Callable] = [getattr(self, name) for name in names]
                part = jnp.concatenate([unit(part) for unit in units], axis=-1)
            parts.append(part)
        return jnp.concatenate(parts, axis=-1)

    def _pooled(self, x: Float[Array, "b h w c"]) -> Float[Array, "b y x c"]:
        if self.pool == "halve":
            return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")
        if self.pool == "max":
            return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")
        return nnx.avg_pool(x, (3, 3), (1, 1), padding="SAME", count_include_pad=False)


class Inception(nnx.Module):
    """Images to the features of the last pool, 2048 of the published network."""

    def __init__(
        self,
        cfg: InceptionConfig = InceptionConfig(),
        *,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.cfg = cfg
        unit = functools.partial(ConvNorm, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        d = cfg.divisor
        self.conv_1a = unit(3, 32 // d, (3, 3), strides=2, padding="VALID")
        self.conv_2a = unit(32 // d, 32 // d, (3, 3), padding="VALID")
        self.conv_2b = unit(32 // d, 64 // d, (3, 3))
        self.conv_3b = unit(64 // d, 80 // d, (1, 1), padding="VALID")
        self.conv_4a = unit(80 // d, 192 // d, (3, 3), padding="VALID")
        width = 192 // d
        for name, (branches, pool) in MIXED.items():
            block = Mixed(width, branches, pool, unit, d)
            setattr(self, f"mixed_{name}", block)
            width = block.width

    @typechecked
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Features of images in [-1, 1] of 75 pixels a side or more (299 is meant)."""
        x = self.conv_2b(self.conv_2a(self.conv_1a(images)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")
        x = self.conv_4a(self.conv_3b(x))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")
        for name in MIXED:
            x = getattr(self, f"mixed_{name}")(x)
        return x.mean(axis=(1, 2))
