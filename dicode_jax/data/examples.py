"""Examples of the trainings: what is read of one record.

Workers import this module, so it knows neither jax nor models.
"""

import dataclasses

import numpy as np

from dicode_jax.data.clips import read_clip, read_frame
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameReader:
    """Single frames: `image` uint8 [h, w, 3], and `labels` int32 [p] of scenes if wanted."""

    data: DataConfig
    frame_size: int
    labels: bool = False

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        example = read_frame(record, self.data, self.frame_size, rng)
        names = ("image", "labels") if self.labels else ("image",)
        return {name: example[name] for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipReader:
    """Clips: `video` uint8 [f, h, w, 3] and the frame stride `fs` int32 that the UNet is told.

    Attributes:
      fs: One stride for all clips; None takes that of each clip.
    """

    data: DataConfig
    frame_size: int
    fs: int | None

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        clip = read_clip(record, self.data, self.frame_size, rng)
        fs = clip["frame_stride"] if self.fs is None else np.asarray(self.fs, np.int32)
        return {"video": clip["video"], "fs": fs}
