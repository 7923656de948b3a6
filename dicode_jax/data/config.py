"""Where training examples come from and how clips are cut out of them."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set and how it is read.

    Attributes:
      path: `shapes` for the synthetic world; otherwise a folder of videos and images, a `.csv` or
        `.jsonl` table, a pattern of `.tar` or `.array_record` shards, or the folder of a token
        cache.
      kind: What `path` is; `auto` tells by its form.
      video_column: Column of a table that names the file; None finds the usual ones.
      caption_column: Column of a table with the caption; None finds the usual ones, "" reads none.
      root: Folder that the files of a table are relative to; None for the table's own. Nothing that
        lies outside of it when links are resolved is read then, of no form of data.
      num_frames: Frames per clip.
      fps: Frames per second that are taken, by the time stamps of the file; None goes by
        `frame_stride`.
      frame_stride: Take every n-th frame of the file, in place of `fps`.
      clip_start: Where in the video a clip starts: `random` (seeded), `start` or `center`.
      resize: `stretch` both sides to the frame size as DiCoDe does, or `crop`: the short side to
        the frame size, then a square. None for that of the tokenizer that a training names, and
        `crop` without one; a tokenizer's training writes it into the tokenizer's config.
      antialias: Widen the filter where frames shrink. A language model reads as its tokenizer
        does, whatever this says.
      crop: Which square: `center` or `random` (seeded).
      min_clip: Share of a clip's frames that a video must hold; its last frame is repeated for the
        others. A shorter one counts as unreadable.
      validation: Share of the examples that is held out, chosen by a hash of their names; the
        synthetic world holds out captions instead.
      shuffle: Seeded order, another one in each epoch; False reads in order.
      num_workers: Processes that decode; 0 decodes in the main one.
      prefetch: Batches that are ready ahead of the step.
      max_broken: Share of unreadable examples at which the run stops.
    """

    path: str = "shapes"
    kind: Literal["auto", "shapes", "folder", "table", "tar", "array_record", "cache"] = "auto"
    video_column: str | None = None
    caption_column: str | None = None
    root: str | None = None
    num_frames: int = 16
    fps: float | None = 8.0
    frame_stride: int | None = None
    clip_start: Literal["random", "start", "center"] = "random"
    resize: Literal["stretch", "crop"] | None = None
    antialias: bool = True
    crop: Literal["center", "random"] = "center"
    min_clip: float = 0.5
    validation: float = 0.01
    shuffle: bool = True
    num_workers: int = 0
    prefetch: int = 2
    max_broken: float = 0.1

    def __post_init__(self):
        if (self.fps is None) == (self.frame_stride is None):
            raise ValueError("give one of fps and frame_stride, and None for the other")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"fps must lie between 0 and 1000, got {self.fps}")
        if self.frame_stride is not None and self.frame_stride < 1:
            raise ValueError(f"frame_stride must be at least 1, got {self.frame_stride}")
        if not 0 < self.min_clip <= 1:
            raise ValueError(f"min_clip must lie above 0 and at most be 1, got {self.min_clip}")
        if not 0 <= self.validation < 1 or not 0 <= self.max_broken <= 1:
            raise ValueError("validation and max_broken are shares between 0 and 1")
        if self.num_frames < 1 or self.num_workers < 0 or self.prefetch < 1:
            raise ValueError("num_frames and prefetch must be positive, num_workers not negative")
