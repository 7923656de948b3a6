"""A small classifier of clips of the shapes world, whose features measure distances of sets.

It reads the five kinds of words off a clip. Its features stand in for those of I3D where there is
nothing to download: a distance on them is called FD-shapes and is no FVD.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.nn.conv import Conv
from dicode_jax.nn.linear import Linear
from dicode_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesClassifierConfig:
    """Sizes.

    Attributes:
      frame_size: Height and width of frames.
      num_frames: Of a clip of two seconds: every other frame of the world's.
      widths: Channels of the convolutions of a frame, the first of stride 4, the others of 2.
      features: Numbers for a clip.
      words: How many words there are of size, colour, shape, motion and background.
      spread: How far features are from their means over clips, root mean square; they are divided
        by it, so that a distance of 1 is one for a reader.
    """

    frame_size: int = 64
    num_frames: int = 8
    widths: tuple[int, ...] = (16, 32, 48)
    features: int = 64
    words: tuple[int, ...] = (3, 8, 4, 8, 4)
    spread: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.spread) and self.spread > 0):
            raise ValueError(f"spread must be above 0, got {self.spread}")
        if not self.widths or min(*self.widths, self.features, self.num_frames) < 1:
            raise ValueError("widths, features and num_frames must be at least 1")
        if self.frame_size % (4 * 2 ** (len(self.widths) - 1)) or self.frame_size < 8:
            raise ValueError(f"frames of {self.frame_size} pixels cannot be halved so often")


class ShapesClassifier(nnx.Module):
    """Frames by themselves, then neighbours in time, then the mean of all."""

    def __init__(
        self,
        cfg: ShapesClassifierConfig = ShapesClassifierConfig(),
        *,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.cfg = cfg
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        convs, width = [], 3
        for i, out in enumerate(cfg.widths):
            place, stride, pad = (8, 4, 2) if i == 0 else (3, 2, ((0, 1), (0, 1)))
            convs.append(Conv(width, out, (place, place), strides=stride, padding=pad, **options))
            width = out
        self.convs = nnx.List(convs)
        side = cfg.frame_size // (4 * 2 ** (len(cfg.widths) - 1))
        d = cfg.features
        self.frame = Linear(side * side * width, d, **options)
        self.times = nnx.List([Linear(3 * d, d, **options) for _ in range(2)])
        self.heads = nnx.List([Linear(d, count, **options) for count in cfg.words])

    def features(self, clips: Float[Array, "b f h w 3"]) -> Float[Array, "b d"]:
        """Of clips in [-1, 1], of the config's size and length; their spread is about 1."""
        return self._read(clips) / self.cfg.spread

    def _read(self, clips: Float[Array, "b f h w 3"]) -> Float[Array, "b d"]:
        b, f, h, w, _ = clips.shape
        x = clips.reshape(b * f, h, w, 3)
        for conv in self.convs:
            x = jax.nn.gelu(conv(x))
        x = jax.nn.gelu(self.frame(x.reshape(b, f, -1)))
        for layer in self.times:
            near = jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode="edge")
            near = jnp.concatenate([near[:, :-2], x, near[:, 2:]], axis=-1)
            x = x + jax.nn.gelu(layer(near))
        return x.mean(axis=1)

    def __call__(self, clips: Float[Array, "b f h w 3"]) -> list[Float[Array, "b n"]]:
        """Logits of the words of size, colour, shape, motion and background."""
        found = self._read(clips)
        return [head(found) for head in self.heads]
