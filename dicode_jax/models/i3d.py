"""I3D, the video network whose logits FVD is of: Inception-v1 inflated to three dimensions.

Carreira and Zisserman, arXiv 1705.07750; trained on Kinetics-400. FVD (Unterthiner et al., arXiv
1812.01717) takes the logits. Letters: b clips, f frames, h and w pixels, c channels.
"""

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx

from dicode_jax.nn.conv_norm import ConvNorm
from dicode_jax.nn.linear import Linear
from dicode_jax.typing import Array, Float, typechecked

# Block -> channels of its branches: 1x1; 1x1 and 3x3; 1x1 and 3x3; 1x1 after pooling.
MIXED = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
POOLED = {"3b": ((1, 3, 3), (1, 2, 2)), "4b": ((3, 3, 3), (2, 2, 2)), "5b": ((2, 2, 2), (2, 2, 2))}
"""Block -> window and strides of the pooling before it."""
LAST = (2, 7, 7)  # window of the average before the logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class I3DConfig:
    """Sizes; the defaults are the published network.

    Attributes:
        num_classes: logits.
        divisor: of all channels, 1, 2, 4 or 8; above 1 it is another, narrower network.
    """

    num_classes: int = 400
    divisor: int = 1

    def __post_init__(self):
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        if self.divisor not in (1, 2, 4, 8):
            raise ValueError(f"divisor must be 1, 2, 4 or 8, got {self.divisor}")


class Mixed(nnx.Module):
    """Four branches side by side."""

    def __init__(self, in_features: int, widths: tuple[int, ...], unit):
        one, two_in, two, three_in, three, four = widths
        self.b0 = unit(in_features, one, (1, 1, 1))
        self.b1a = unit(in_features, two_in, (1, 1, 1))
        self.b1b = unit(two_in, two, (3, 3, 3))
        self.b2a = unit(in_features, three_in, (1, 1, 1))
        self.b2b = unit(three_in, three, (3, 3, 3))
        self.b3b = unit(in_features, four, (1, 1, 1))

    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w o"]:
        pooled = nnx.max_pool(x, (3, 3, 3), strides=(1, 1, 1), padding="SAME")
        branches = [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)]
        return jnp.concatenate(branches, axis=-1)


class I3D(nnx.Module):
    """Clips to logits."""

    def __init__(
        self,
        cfg: I3DConfig = I3DConfig(),
        *,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.cfg = cfg
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        unit = functools.partial(ConvNorm, **options)
        d = cfg.divisor
        self.conv_1a = unit(3, 64 // d, (7, 7, 7), strides=2)
        self.conv_2b = unit(64 // d, 64 // d, (1, 1, 1))
        self.conv_2c = unit(64 // d, 192 // d, (3, 3, 3))
        width = 192 // d
        for name, published in MIXED.items():
            widths = tuple(channels // d for channels in published)
            setattr(self, f"mixed_{name}", Mixed(width, widths, unit))
            width = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = Linear(width, cfg.num_classes, **options)

    @typechecked
    def __call__(self, clips: Float[Array, "b f h w 3"]) -> Float[Array, "b n"]:
        """Logits, the mean over time.

        Args:
            clips: pixels in [-1, 1]; 9 frames or more, of 193 to 224 pixels a side (224 is meant).

        Raises:
            ValueError: the clips are of another size.
        """
        _, f, h, w, _ = clips.shape
        if f < 9 or not all(193 <= side <= 224 for side in (h, w)):
            raise ValueError(f"I3D takes 9 frames or more of 224 x 224, got {f} of {w} x {h}")
        x = self.conv_1a(clips)
        # Padding of pools never wins: nothing is below 0 after a ReLU.
        x = nnx.max_pool(x, (1, 3, 3), strides=(1, 2, 2), padding="SAME")
        x = self.conv_2c(self.conv_2b(x))
        for name in MIXED:
            if name in POOLED:
                window, strides = POOLED[name]
                x = nnx.max_pool(x, window, strides=strides, padding="SAME")
            x = getattr(self, f"mixed_{name}")(x)
        x = nnx.avg_pool(x, LAST, strides=(1, 1, 1), padding="VALID")
        return self.logits(x[:, :, 0, 0]).mean(axis=1)
