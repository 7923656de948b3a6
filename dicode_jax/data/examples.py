"""Examples of the trainings: what is read of one record.

Workers import this module, so it knows neither jax nor models.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping

import numpy as np

from dicode_jax.data.clips import read_clip, read_frame, read_whole
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import BrokenRecord, ClipSource, Record
from dicode_jax.data.shapes_world import Scene
from dicode_jax.data.sources.shapes import frame_labels


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
class SpanReader:
    """First and last frame of a clip and one between: `image` uint8 [3, h, w, 3] in their order.

    `place` float32, above 0 and below 1, is where the one between lies. Of scenes there are also
    `labels` int32 [p] if wanted.
    """

    data: DataConfig
    frame_size: int
    labels: bool = False

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        video = read_clip(record, self.data, self.frame_size, rng)["video"]
        last = len(video) - 1
        between = int(rng.integers(1, last))
        found = {"image": video[[0, between, last]], "place": np.float32(between / last)}
        if not self.labels:
            return found
        assert isinstance(record.media, Scene)  # see `probes.check_labels`
        return found | {"labels": frame_labels(record.media)}


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeReader:
    """Whole videos on their way into a cache: `frames` uint8 [n, h, w, 3], `times` float64 [n].

    Attributes:
      clip_frames: Of two seconds of a scene, see `read_whole`.
    """

    data: DataConfig
    frame_size: int
    clip_frames: int | None = None

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        clip = self.clip_frames
        return read_whole(record, self.data, self.frame_size, rng, clip_frames=clip)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideosToEncode:
    """Videos on their way into a cache, those at `indices`; broken ones say so.

    What is read of a video depends on the seed and its own index alone.

    Attributes:
      read: Gives `frames` uint8 [k, h, w, 3] and `times` float64 [k] of a record.
    """

    source: ClipSource
    indices: np.ndarray
    read: Callable[[Record, np.random.Generator], Mapping[str, np.ndarray]]
    seed: int

    def __call__(self, place: int, _: np.random.Generator) -> dict[str, np.ndarray]:
        """What `read` gives, and `info`.

        `info` is JSON text: `name`, `captions` and `source`, or `name` and what is `broken`. The
        name is the canonical one, so that a split of the cache has the sides of its data set.
        """
        index = int(self.indices[place])
        name = self.source.canonical_name(index)
        rng = np.random.default_rng((self.seed, index))
        try:
            record = self.source.record(index)
            found = self.read(record, rng)
        except BrokenRecord as error:
            info = {"name": name, "broken": str(error)}
            return {"info": np.array(json.dumps(info))}
        path = getattr(record.media, "path", record.name)
        info = {"name": name, "captions": record.captions, "source": path}
        return {"info": np.array(json.dumps(info)), **found}
