"""Examples that may begin at any frame, also of a scene: windows of a video, and its beginning.

Workers import this module, so it knows neither jax nor models.
"""

import dataclasses

import numpy as np
from jaxtyping import UInt8

from dicode_jax.data import shapes_world
from dicode_jax.data.clips import read_clip, read_whole
from dicode_jax.data.config import DataConfig
from dicode_jax.data.frame_size import FrameSize, square_side
from dicode_jax.data.records import BrokenRecord, Record
from dicode_jax.data.sources.shapes import frame_labels
from dicode_jax.media.video import KEYFRAME_INTERVAL

SCENE_SECONDS = 20.0  # of a scene, in which `clip_start="random"` chooses


def read_window(
    record: Record, cfg: DataConfig, frame_size: FrameSize, rng: np.random.Generator
) -> UInt8[np.ndarray, "f h w 3"]:
    """Reads a clip as `read_clip`, but of a scene any of its frames may be the first.

    Of a scene frames are `1 / cfg.fps` seconds apart, or as many of its own as `cfg.frame_stride`;
    a start that is not random is its beginning, where it obeys its caption.

    Raises:
      BrokenRecord: As `read_clip`.
    """
    if not isinstance(record.media, shapes_world.Scene):
        return read_clip(record, cfg, frame_size, rng)["video"]
    step = _scene_step(cfg)
    first = int(rng.integers(round(SCENE_SECONDS / step))) if cfg.clip_start == "random" else 0
    times = (first + np.arange(cfg.num_frames)) * step / KEYFRAME_INTERVAL
    return shapes_world.render_at(record.media, times, frame_size=square_side(frame_size))


def _scene_step(cfg: DataConfig) -> float:
    """Seconds between two frames that are taken of a scene."""
    return 1 / cfg.fps if cfg.fps is not None else (cfg.frame_stride or 1) / shapes_world.FPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowReader:
    """Clips that start anywhere: `video` uint8 [f, h, w, 3].

    Attributes:
      crop_size: Side of a random square of the clip that is taken; None takes all of it.
      has_labels: Adds `labels` int32 [3], see `frame_labels`: all records are scenes.
    """

    data: DataConfig
    frame_size: FrameSize
    crop_size: int | None = None
    has_labels: bool = False

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        video, size = read_window(record, self.data, self.frame_size, rng), self.crop_size
        if size is not None:
            top, left = (int(rng.integers(side - size + 1)) for side in video.shape[1:3])
            video = video[:, top : top + size, left : left + size]
        if not self.has_labels:
            return {"video": video}
        assert isinstance(record.media, shapes_world.Scene)  # see `probes.check_labels`
        return {"video": video, "labels": frame_labels(record.media)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeginningReader:
    """The beginnings of videos: `frames` uint8 [n, h, w, 3] and `times` float64 [n].

    They have `step` m + 1 frames, at least one step and at most `data.num_frames`; what is behind
    them is left out.

    Attributes:
      step: Frames that more of a video are taken by.
    """

    data: DataConfig
    frame_size: FrameSize
    step: int

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        most = (self.data.num_frames - 1) // self.step * self.step + 1
        if isinstance(record.media, shapes_world.Scene):
            data = dataclasses.replace(self.data, clip_start="start", num_frames=most)
            frames = read_window(record, data, self.frame_size, rng)
            return {"frames": frames, "times": np.arange(most) * _scene_step(data)}
        found = read_whole(record, self.data, self.frame_size, rng)
        count = (min(len(found["frames"]), most) - 1) // self.step * self.step + 1
        if count <= 1:
            raise BrokenRecord(
                f"{record.name}: is too short, it shows {len(found['frames'])} frames of the "
                f"{self.step + 1} that are the least"
            )
        return {name: x[:count] for name, x in found.items()}
