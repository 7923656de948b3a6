"""Distances between two sets of videos, on features of a network, by a pinned protocol.

A distance has a meaning beside others of the same protocol alone: features, frames, size, resize,
rate and count are part of what is reported, and sets of unequal size are refused, since the
distance grows as sets shrink. The networks are in `dicode_jax.evaluation.networks`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from dicode_jax.errors import UserError
from dicode_jax.evaluation.frechet import frechet_distance
from dicode_jax.evaluation.kernel_distance import kernel_distance
from dicode_jax.media.resize import resize_square
from dicode_jax.media.transforms import resize_bilinear

Clip = UInt8[np.ndarray, "f s s 3"] | Float[np.ndarray, "f s s 3"]  # of a protocol, in 0..255


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """A network that turns clips into features, and the clips that it takes.

    Attributes:
      name: Of the network.
      labels: What the Fréchet and the kernel distance are called; made of the name by default.
      digest: Of the weights, for whoever compares numbers.
      num_frames: Of a clip, the first ones of a video.
      frame_size: A frame's middle square is resized to it.
      fps: Frames a second of a clip; None for those that videos have.
      antialias: Whether the resize is antialiased, and rounded to whole grey levels then.
      of_frames: Whether each frame has features of its own.
      at_once: Clips in one call of the network.
      run: Clips [b, f, h, w, 3] in 0..255 -> features [b, d], or [b * f, d] of frames.
    """

    name: str
    labels: tuple[str, str] | None = None
    digest: str
    num_frames: int
    frame_size: int
    fps: float | None
    antialias: bool = True
    of_frames: bool = False
    at_once: int = 16
    run: Callable[[np.ndarray], Float[np.ndarray, "n d"]]

    @property
    def names(self) -> tuple[str, str]:
        """What the Fréchet and the kernel distance are called."""
        return self.labels or (f"FD-{self.name}", f"KVD-{self.name}")

    def clip(self, frames: Sequence[UInt8[np.ndarray, "h w 3"]], fps: float, name: object) -> Clip:
        """The clip of a video of so many frames a second: what is on screen at the clip's times.

        Args:
          name: What an error calls the video.

        Raises:
          UserError: It is too short.
        """
        own = self.fps or fps
        places = (np.arange(self.num_frames) * fps / own + 1e-6).astype(int)
        if places[-1] >= len(frames):
            raise UserError(
                f"{name} has {len(frames)} frames, {fps:g} a second; distances on {self.name} "
                f"features look at {self.num_frames}, {own:g} a second"
            )
        size = self.frame_size
        if self.antialias:
            return np.stack([fitted(frames[i], size) for i in places])
        whole = np.stack([frames[i] for i in places])
        return np.asarray(_interpolated(whole, size))

    def __call__(self, clips: Iterable[Clip]) -> Float[np.ndarray, "n d"]:
        """Features of clips, a batch at a time; the last one is filled up, so that one compiles."""
        clips, found = iter(clips), []
        while part := list(itertools.islice(clips, self.at_once)):
            full = np.stack(part + [part[-1]] * (self.at_once - len(part)))
            rows = np.asarray(self.run(full), np.float64)
            found.append(rows[: len(rows) // self.at_once * len(part)])
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


@functools.partial(jax.jit, static_argnums=1)
def _interpolated(frames, size):
    """Middle squares by two taps an axis, neither antialiased nor rounded."""
    return resize_bilinear(frames.astype(jnp.float32), (size, size), crop=True)


def protocol(features: Features) -> dict[str, Any]:
    """All that a distance depends on besides the videos."""
    size = features.frame_size
    how = "triangle filter with antialiasing, rounded" if features.antialias else "two taps"
    return {
        "features": f"{features.name}, weights {features.digest}",
        "samples": "each frame" if features.of_frames else "each clip",
        "frames of a clip": features.num_frames,
        "which frames": "the first ones",
        "frames a second": features.fps or "as the videos have",
        "size": f"{size} x {size}, the middle square, bilinear, {how}",
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
    features: Features,
    first: Sequence[Clip],
    second: Sequence[Clip],
) -> dict[str, float]:
    """Fréchet and kernel distance between two sets of clips.

    Raises:
      UserError: The sets are not of one size, or of fewer than two clips.
    """
    check_counts(len(first), len(second))
    return between(features, features(first), features(second))


def between(
    features: Features,
    first: Float[np.ndarray, "n d"],
    second: Float[np.ndarray, "n d"],
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, float]:
    """The same of what the network found, of those distances whose names are wanted."""
    measures = zip(features.names, (frechet_distance, kernel_distance), strict=True)
    return {name: measure(first, second) for name, measure in measures if wanted(name)}
