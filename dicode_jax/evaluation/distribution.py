"""Distances between two sets of videos, on features of a network, by a pinned protocol.

A distance has a meaning beside others of the same protocol alone: features, frames, size, rate and
count are part of what is reported, and sets of unequal size are refused, since the distance grows
as sets shrink.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from dicode_jax.data import shapes_world
from dicode_jax.errors import UserError
from dicode_jax.evaluation.frechet import frechet_distance
from dicode_jax.evaluation.kernel_distance import kernel_distance
from dicode_jax.media.resize import resize_square
from dicode_jax.models.shapes_classifier import ShapesClassifier, ShapesClassifierConfig
from dicode_jax.storage import weights

Video = UInt8[np.ndarray, "f h w 3"]
AT_ONCE = 16  # clips in one call of a network

NOTES = {
    "FD-shapes": "Fréchet distance on features of a small classifier of the shapes world; no FVD",
    "KVD-shapes": "unbiased kernel distance on the same features; 0 on the mean for two sets of "
    "one distribution, so that values may be negative",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """A network that turns clips into features, and the clips that it takes.

    Attributes:
      name: Distances are called by it: `FD-name` and `KVD-name`.
      digest: Of the weights, for whoever compares numbers.
      num_frames, frame_size, fps: Of a clip: the first frames of a video at that rate, the middle
        square, resized with antialiasing.
      run: Clips uint8 [b, f, h, w, 3] -> features [b, d].
    """

    name: str
    digest: str
    num_frames: int
    frame_size: int
    fps: float
    run: Callable[[UInt8[np.ndarray, "b f h w 3"]], Float[np.ndarray, "b d"]]

    def clip(self, frames: Sequence[UInt8[np.ndarray, "h w 3"]], fps: float, name: object) -> Video:
        """The clip of a video of so many frames a second.

        Args:
          name: What an error calls the video.

        Raises:
          UserError: It is too short.
        """
        places = np.round(np.arange(self.num_frames) * fps / self.fps).astype(int)
        if places[-1] >= len(frames):
            raise UserError(
                f"{name} has {len(frames)} frames, {fps:g} a second; distances on {self.name} "
                f"features look at {self.num_frames}, {self.fps:g} a second"
            )
        return np.stack([fitted(frames[i], self.frame_size) for i in places])

    def __call__(self, clips: Sequence[Video]) -> Float[np.ndarray, "n d"]:
        """Features of clips, a batch at a time; the last one is filled up, so that one compiles."""
        found = []
        for start in range(0, len(clips), AT_ONCE):
            part = np.stack(clips[start : start + AT_ONCE])
            full = np.concatenate([part, np.repeat(part[-1:], AT_ONCE - len(part), 0)])
            found.append(np.asarray(self.run(full), np.float64)[: len(part)])
        return np.concatenate(found)


def fitted(frame: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """The middle square, resized with antialiasing and rounded; as it is where it fits."""
    h, w = frame.shape[:2]
    if (h, w) == (size, size):
        return frame
    side = min(h, w)
    left, top = (w - side) / 2, (h - side) / 2
    small = resize_square(frame, size, (left, top, left + side, top + side), antialias=True)
    return np.clip(np.round(small), 0, 255).astype(np.uint8)


def shapes_features(folder: str | os.PathLike) -> Features:
    """Those of a classifier of the shapes world that `scripts/train_shapes_features.py` trained.

    Raises:
      UserError: The folder holds none.
    """
    folder = pathlib.Path(folder)
    model, cfg = weights.load_module(folder, ShapesClassifier, ShapesClassifierConfig)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, clips):
        return nnx.merge(graph, state).features(clips.astype(jnp.float32) / 127.5 - 1)

    return Features(
        name="shapes",
        digest=hashlib.sha256((folder / weights.WEIGHTS_FILE).read_bytes()).hexdigest()[:16],
        num_frames=cfg.num_frames,
        frame_size=cfg.frame_size,
        fps=shapes_world.FPS * cfg.num_frames / shapes_world.NUM_FRAMES,
        run=lambda clips: np.asarray(run(state, clips)),
    )


def protocol(features: Features) -> dict[str, Any]:
    """All that a distance depends on besides the videos."""
    size = features.frame_size
    return {
        "features": f"{features.name}, weights {features.digest}",
        "frames of a clip": features.num_frames,
        "which frames": "the first ones",
        "frames a second": features.fps,
        "size": f"{size} x {size}, the middle square, triangle filter with antialiasing",
    }


def check_counts(first: int, second: int) -> None:
    """Refuses sets of unequal size, or of fewer than two.

    Raises:
      UserError: They are such.
    """
    if first != second:
        raise UserError(
            f"{first} videos cannot be compared with {second}: a distance depends on how many "
            "there are; leave some out"
        )
    if first < 2:
        raise UserError(f"a distance is one of sets of two videos at least, got {first}")


def distances(
    features: Features, first: Sequence[Video], second: Sequence[Video]
) -> dict[str, float]:
    """Fréchet and kernel distance between two sets of clips.

    Raises:
      UserError: The sets are not of one size, or of fewer than two clips.
    """
    check_counts(len(first), len(second))
    a, b = features(first), features(second)
    return {
        f"FD-{features.name}": frechet_distance(a, b),
        f"KVD-{features.name}": kernel_distance(a, b),
    }
