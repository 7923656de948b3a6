"""Pixels of a record: a clip, a frame or keyframes, cut and resized by explicit, seeded rules.

Frames are chosen by their time stamps, never by their number in the file, so that a variable frame
rate does not matter. A frame is on screen from its own time to that of the next; the first one is
at 0. Files are read with one thread: workers, not codecs, use the cores.
"""

import contextlib
import dataclasses
import io
import math
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

import av
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from dicode_jax.data import shapes_world as synthetic
from dicode_jax.data.config import DataConfig
from dicode_jax.data.frame_size import FrameSize, sides, square_side
from dicode_jax.data.records import BrokenRecord, MediaBytes, MediaFile, Record
from dicode_jax.data.shapes_world import Scene
from dicode_jax.data.sources.shapes import frame_labels
from dicode_jax.errors import UserError, printable
from dicode_jax.media.container import check_complete, check_index, open_container
from dicode_jax.media.picture import open_picture
from dicode_jax.media.resize import resize_part
from dicode_jax.media.shown import Shown, shown_picture
from dicode_jax.media.video import KEYFRAME_INTERVAL, ROUNDING, in_cell, rounding_of
from dicode_jax.storage.files import is_file_name

_SEEK_FROM = 1.0  # seconds; an earlier frame is reached sooner by decoding from the beginning
_LONGEST_GAP = 3600.0  # seconds between two frames, beyond which the time stamps are wrong
_MOST_PIXELS = 2**31  # bytes of a video that is read whole
_SCENE_CLIPS = 10  # clips of a scene, among which `clip_start="random"` chooses

_Fit = Callable[[Image.Image], np.ndarray]


def read_clip(
    record: Record, cfg: DataConfig, frame_size: FrameSize, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Reads one clip.

    Frames are `1 / cfg.fps` seconds or `cfg.frame_stride` frames apart. A random start is uniform
    over all from which the last frame of the clip is still on screen. Of a scene, a clip is the two
    seconds between two keyframes, both included, whatever `fps` says.

    Returns:
      `video` uint8 [f, h, w, 3]; `fps` float32 and `frame_stride` int32, scalars: what the clip
      has per second, and how many frames of the file go to one of the clip, rounded.

    Raises:
      BrokenRecord: The file cannot be read, is a picture, or shows less than `cfg.min_clip` of a
        clip.
    """
    f = cfg.num_frames
    if isinstance(record.media, Scene):
        first = int(rng.integers(_SCENE_CLIPS)) if cfg.clip_start == "random" else 0
        frames = synthetic.render(
            record.media, first_clip=first, num_frames=f, frame_size=square_side(frame_size)
        )
        return _clip(frames[0], f / KEYFRAME_INTERVAL, 1)
    if record.is_image:
        raise BrokenRecord(f"{record.name}: is a picture, which gives no clip")
    with _reader(record) as reader:
        times, length = reader.times, reader.length
        rate = (len(times) - 1) / times[-1] if len(times) > 1 else 1.0
        if cfg.fps is None:
            assert cfg.frame_stride is not None  # `DataConfig` asks for one of the two
            stride = cfg.frame_stride
            room = len(times) - (f - 1) * stride
            latest = max(room - 1, 0)
            start = {"start": 0, "center": latest // 2}.get(cfg.clip_start)
            start = int(rng.integers(latest + 1)) if start is None else start
            wanted = start + stride * np.arange(f)
            there = int(np.sum(wanted < len(times)))
            targets, fps = times[np.minimum(wanted, len(times) - 1)], rate / stride
        else:
            fps, stride = cfg.fps, max(1, round(rate / cfg.fps))
            span = (f - 1) / fps
            latest = {"start": 0.0, "center": (times[-1] - span) / 2}.get(cfg.clip_start)
            start = rng.uniform(0, max(length - span, 0)) if latest is None else max(latest, 0)
            wanted = start + np.arange(f) / fps
            there = int(np.sum(wanted < length))
            targets = np.minimum(wanted, times[-1])
        if there < cfg.min_clip * f:
            raise BrokenRecord(
                f"{record.name}: is too short, it shows {there} of the {f} frames of a clip"
            )
        frames = reader.frames_at(targets, _make_fit(cfg, frame_size, rng))
    return _clip(frames, fps, stride)


def read_frame(
    record: Record, cfg: DataConfig, frame_size: FrameSize, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Reads one frame at a time that `cfg.clip_start` says: any, the first, or the middle one.

    Returns:
      `image` uint8 [h, w, 3]. Of a scene also `labels` int32 [3], as
      `sources_shapes.FRAME_LABELS` lists them, and the time is uniform over its first ten clips.

    Raises:
      BrokenRecord: The file cannot be read.
    """
    share = {"start": 0.0, "center": 0.5}.get(cfg.clip_start)
    share = rng.uniform() if share is None else share
    if isinstance(record.media, Scene):
        times = np.array([share * _SCENE_CLIPS])
        image = synthetic.render_at(record.media, times, frame_size=square_side(frame_size))[0]
        return {"image": image, "labels": frame_labels(record.media)}
    with _reader(record) as reader:
        time = min(share * reader.length, reader.times[-1])
        (image,) = reader.frames_at(np.array([time]), _make_fit(cfg, frame_size, rng))
    return {"image": image}


def read_keyframes(
    record: Record,
    cfg: DataConfig,
    frame_size: FrameSize,
    rng: np.random.Generator,
    num_keyframes: int,
) -> dict[str, np.ndarray]:
    """Reads keyframes two seconds apart, padded to `num_keyframes`.

    A video that lasts long enough for all of them starts where `cfg.clip_start` says; of a shorter
    one they start at 0, and its last frame is added when there is only one or when more than a
    second would be left. A picture is one keyframe. Scenes start at 0, where they obey the caption.

    Returns:
      `keyframes` uint8 [k, h, w, 3], zero where there is none; `frame_mask` bool [k]; `times`
      float32 [k], seconds in the video.

    Raises:
      BrokenRecord: The file cannot be read.
    """
    if num_keyframes < 1:
        raise ValueError(f"num_keyframes must be positive, got {num_keyframes}")
    if isinstance(record.media, Scene):
        times = KEYFRAME_INTERVAL * np.arange(num_keyframes)
        frames = synthetic.render_keyframes(
            record.media, num_keyframes, frame_size=square_side(frame_size)
        )
    else:
        with _reader(record) as reader:
            times = _keyframe_times(reader.times, reader.length, cfg, rng, num_keyframes)
            frames = reader.frames_at(times, _make_fit(cfg, frame_size, rng))
    k = len(frames)
    keyframes = np.zeros((num_keyframes, *frames.shape[1:]), np.uint8)
    keyframes[:k] = frames
    padded = np.zeros(num_keyframes, np.float32)
    padded[:k] = times
    return {"keyframes": keyframes, "frame_mask": np.arange(num_keyframes) < k, "times": padded}


def read_whole(
    record: Record,
    cfg: DataConfig,
    frame_size: FrameSize,
    rng: np.random.Generator,
    *,
    clip_frames: int | None = None,
) -> dict[str, np.ndarray]:
    """Reads all frames of a video that are `1 / cfg.fps` seconds or `cfg.frame_stride` apart.

    Of a scene these are its first `cfg.num_frames`.

    Args:
      clip_frames: Frames of two seconds of a scene, both keyframes included, as `read_clip` gives a
        clip of so many; None for all that are read.

    Returns:
      `frames` uint8 [n, h, w, 3] and `times` float64 [n], seconds in the video.

    Raises:
      BrokenRecord: The file cannot be read, is a picture, or its frames need more than 2 GiB.
    """
    if isinstance(record.media, Scene):
        clips = np.arange(cfg.num_frames) / max((clip_frames or cfg.num_frames) - 1, 1)
        frames = synthetic.render_at(record.media, clips, frame_size=square_side(frame_size))
        return {"frames": frames, "times": KEYFRAME_INTERVAL * clips}
    if record.is_image:
        raise BrokenRecord(f"{record.name}: is a picture, which gives no clip")
    with _reader(record) as reader:
        if cfg.fps is None:
            times = np.asarray(reader.times[:: cfg.frame_stride])
        else:
            times = np.minimum(np.arange(0, reader.length, 1 / cfg.fps), reader.times[-1])
        if (size := len(times) * 3 * math.prod(sides(frame_size))) > _MOST_PIXELS:
            raise BrokenRecord(
                f"{record.name}: is too long, its {len(times)} frames need {size / 2**30:.1f} GiB "
                "at once; cut it into parts"
            )
        frames = reader.frames_at(times, _make_fit(cfg, frame_size, rng))
    return {"frames": frames, "times": times.astype(np.float64)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """What a file really holds: `width`, `height`, frames, and seconds until the last one ends."""

    width: int
    height: int
    num_frames: int
    duration: float


def probe(record: Record) -> MediaInfo:
    """Goes through the packets of a file and decodes its first and its last frame.

    Raises:
      BrokenRecord: The file cannot be read.
    """
    sizes: list[tuple[int, int]] = []

    def note(image: Image.Image) -> np.ndarray:
        sizes.append(image.size)
        return np.zeros((1, 1, 3), np.uint8)

    with _reader(record) as reader:
        reader.frames_at(reader.times[:1], note)
        reader.frames_at(reader.times[-1:], note)
        (width, height), count, length = sizes[0], len(reader.times), reader.length
    return MediaInfo(width=width, height=height, num_frames=count, duration=length)


def frames_there(info: MediaInfo, cfg: DataConfig) -> int:
    """How many frames of a clip that starts at 0 a video shows, `cfg.num_frames` at most."""
    if cfg.fps is None:
        assert cfg.frame_stride is not None  # `DataConfig` asks for one of the two
        return min(cfg.num_frames, -(-info.num_frames // cfg.frame_stride))
    return int(np.sum(np.arange(cfg.num_frames) / cfg.fps < info.duration))


def read_overview(
    record: Record, count: int, height: int = 112, *, enlarge: bool = True
) -> UInt8[np.ndarray, "f h w 3"]:
    """Up to `count` frames from the first to the last, uncut, for a cell of a contact sheet.

    Args:
      height: Of the cell, see `media.sheet.in_cell`.
      enlarge: Bring lower frames to this height, too.

    Raises:
      BrokenRecord: The file cannot be read.
    """
    if isinstance(record.media, Scene):
        return synthetic.render(record.media, num_frames=count)[0]

    sizes: list[tuple[int, int]] = []  # that of the first frame counts

    def fit(image: Image.Image) -> np.ndarray:
        factor = in_cell(*image.size, height)
        factor = factor if enlarge else min(factor, 1.0)
        sizes.append((max(1, round(factor * image.width)), max(1, round(factor * image.height))))
        return np.asarray(image.resize(sizes[0], Image.Resampling.BILINEAR))

    with _reader(record) as reader:
        count = min(count, len(reader.times))
        return reader.frames_at(np.linspace(0, reader.times[-1], count), fit)


# Choosing


def _clip(frames: np.ndarray, fps: float, stride: int) -> dict[str, np.ndarray]:
    stride_read = np.asarray(stride, np.int32)
    return {"video": frames, "fps": np.asarray(fps, np.float32), "frame_stride": stride_read}


def _keyframe_times(
    times: np.ndarray, length: float, cfg: DataConfig, rng: np.random.Generator, count: int
) -> np.ndarray:
    interval = KEYFRAME_INTERVAL
    spare = length - (count - 1) * interval
    if spare > ROUNDING:
        center = max((times[-1] - (count - 1) * interval) / 2, 0.0)
        start = {"start": 0.0, "center": center}.get(cfg.clip_start)
        start = rng.uniform(0, spare) if start is None else start
        return np.minimum(start + interval * np.arange(count), times[-1])
    grid = interval * np.arange(1 + int((times[-1] + ROUNDING) // interval))
    if len(times) > 1 and (len(grid) == 1 or length - grid[-1] > interval / 2):
        grid = np.append(grid, times[-1])
    return grid[:count]


def _make_fit(cfg: DataConfig, frame_size: FrameSize, rng: np.random.Generator) -> _Fit:
    """Cuts and resizes all frames of an example in the same way."""
    x, y = rng.uniform(size=2) if cfg.crop == "random" else (0.5, 0.5)
    height, width = sides(frame_size)

    def fit(image: Image.Image) -> np.ndarray:
        box = (0.0, 0.0, float(image.width), float(image.height))
        if cfg.resize != "stretch":
            w, h = image.width, image.height
            if w * height > h * width:  # wider than what is wanted
                w = h * width / height
            else:
                h = w * height / width
            left, top = x * (image.width - w), y * (image.height - h)
            box = (left, top, left + w, top + h)
        if not cfg.antialias:
            levels = resize_part(np.asarray(image), (height, width), box, antialias=False)
            return np.rint(levels).clip(0, 255).astype(np.uint8)
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))

    return fit


# Reading


class _Picture:
    """A single picture, seen as a video of one frame that lasts no time."""

    def __init__(self, name: str, file: Any):
        with open_picture(file, name) as image:
            self._image = shown_picture(image)
        self.times, self.length = np.zeros(1), 0.0

    def frames_at(self, targets: np.ndarray, fit: _Fit) -> np.ndarray:
        return np.stack([fit(self._image)] * len(targets))


class _Video:
    """A video file whose packets have been listed: when its frames are shown, but no pixels yet.

    Attributes:
      times: Seconds at which frames appear, increasing, the first at 0.
      length: Seconds until the last one is over.
    """

    def __init__(self, name: str, file: str | io.BytesIO):
        self._name, self._file = name, file
        with self._opened() as (container, stream):
            listed = check_index(name, container, stream)
            self._origin, times, last = _list_packets(name, container, stream, listed)
        self._seekable = times is not None
        if times is None:  # such as old avi files
            with self._opened() as (container, stream):
                self._origin = 0.0
                frames = container.decode(stream)
                seen = np.array([time for time, _ in _timed(frames, stream, 0.0)])
                self._origin = float(seen[0]) if len(seen) else 0.0
                times, last = np.unique(seen) - self._origin, None
        self.times: np.ndarray = times
        if not len(self.times):
            raise BrokenRecord(f"{name}: holds no frame")
        steps = np.diff(self.times)
        if len(steps) and steps.max() > _LONGEST_GAP:
            raise BrokenRecord(f"{name}: jumps by {steps.max():.0f} s; its time stamps are wrong")
        step = float(np.median(steps)) if len(steps) else (last or 0.0)
        self._step, self._rounding = step, rounding_of(step)
        self.length = float(self.times[-1]) + (min(last, 2 * step) if last else step)

    def frames_at(self, targets: Float[np.ndarray, " n"], fit: _Fit) -> UInt8[np.ndarray, "n ..."]:
        """What is on screen at these times, which increase, through `fit`."""
        if self._seekable and targets[0] > _SEEK_FROM:
            # A format without an index may land where nothing, or not all, can be decoded.
            with contextlib.suppress(UserError):
                found = self._decode(targets, fit, seek=True)
                if found is not None:
                    return np.stack(found)
        found = self._decode(targets, fit, seek=False)
        if found is None:
            raise BrokenRecord(f"{self._name}: its first frame cannot be decoded")
        return np.stack(found)

    def _decode(self, targets, fit: _Fit, *, seek: bool) -> list[np.ndarray] | None:
        """None when decoding begins after the first target."""
        found: list[np.ndarray] = []
        with self._opened() as (container, stream):
            if seek:
                place = (targets[0] + self._origin) / float(stream.time_base)
                container.seek(int(place), stream=stream)
            shown, shown_time, pixels = None, 0.0, None
            screen = Shown(stream, self._name)

            def fitted(frame: av.VideoFrame) -> np.ndarray:
                return fit(Image.fromarray(screen.pixels(frame)))

            frames = screen.frames(container.demux(stream))
            for time, frame in _timed(frames, stream, self._origin):
                if shown is None and time > targets[0] + self._rounding and self._seekable:
                    return None
                while len(found) < len(targets) and time > targets[len(found)] + self._rounding:
                    pixels = fitted(shown or frame) if pixels is None else pixels
                    found.append(pixels)
                if len(found) == len(targets):
                    return found
                shown, shown_time, pixels = frame, time, None
            if shown is None:
                raise BrokenRecord(f"{self._name}: nothing in it can be decoded")
            at = np.searchsorted(self.times, targets[-1] + self._rounding, side="right") - 1
            if self.times[at] - shown_time > 2 * self._step + ROUNDING:
                raise BrokenRecord(
                    f"{self._name}: is cut short or damaged: decoding ends after "
                    f"{shown_time:.1f} of {self.length:.1f} s"
                )
            pixels = fitted(shown) if pixels is None else pixels
        return found + [pixels] * (len(targets) - len(found))

    @contextlib.contextmanager
    def _opened(self):
        if isinstance(self._file, io.BytesIO):
            self._file.seek(0)
        with open_container(self._file, self._name) as (container, stream):
            stream.codec_context.thread_count = 1
            yield container, stream


@contextlib.contextmanager
def _reader(record: Record) -> Iterator[_Picture | _Video]:
    """Opens a record; all that is wrong with its file becomes one `BrokenRecord`."""
    media = record.media
    assert not isinstance(media, Scene), "scenes are drawn, not read"
    try:
        read = _Picture if record.is_image else _Video
        yield read(record.name, _open(record.name, media))
    except BrokenRecord:
        raise
    except UserError as error:
        raise BrokenRecord(str(error)) from error
    except Exception as error:  # of many kinds: whatever a stranger's file may cause in a library
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {printable(error, 200)}"
        raise BrokenRecord(f"{record.name}: {why}") from error


def _open(name: str, media: MediaFile | MediaBytes) -> Any:
    """A path, or a file in memory."""
    if isinstance(media, MediaFile) and not is_file_name(media.path):
        raise BrokenRecord(f"{name}: is no name that a file can have")
    if isinstance(media, MediaBytes):
        data = media.data
    elif media.size is not None:
        with open(media.path, "rb") as file:
            file.seek(media.offset)
            data = file.read(media.size)
        if len(data) < media.size:
            raise BrokenRecord(f"{name}: {media.path} is cut short")
    else:
        status = os.stat(media.path)
        if not stat.S_ISREG(status.st_mode):  # to read a pipe would wait for ever
            raise BrokenRecord(f"{name}: is no file")
        if not status.st_size:
            raise BrokenRecord(f"{name}: is empty")
        return media.path
    if not data:
        raise BrokenRecord(f"{name}: is empty")
    return io.BytesIO(data)


def _list_packets(
    name: str, container, stream, listed: int
) -> tuple[float, np.ndarray | None, float | None]:
    """Time of the first frame, times of all after it, and how long the last one stays.

    The times are None when packets do not have any.
    """
    stamps, durations, end, count = [], [], 0.0, 0
    for packet in container.demux():
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream or not packet.size:
            continue
        count += 1
        if packet.pts is None:
            return 0.0, None, None
        if not packet.is_discard:
            stamps.append(packet.pts)
            durations.append(packet.duration or 0)
    rate = stream.average_rate or stream.guessed_rate or 25
    step = 1 / float(rate)
    check_complete(name, container, stream, listed=listed, packets=count, end=end, step=step)
    if not stamps:
        return 0.0, np.zeros(0), None
    order, base = np.argsort(stamps, kind="stable"), float(stream.time_base)
    origin = stamps[order[0]] * base
    times = np.unique(np.array(stamps, np.int64)) * base - origin
    last = durations[order[-1]] * base
    return origin, times, last or None


def _timed(
    frames: Iterator[av.VideoFrame], stream, origin: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames with their times; one without a time stamp follows the frame before it."""
    step = 1.0 / float(stream.average_rate or stream.guessed_rate or 25)
    time = None
    for frame in frames:
        if frame.time is not None:
            time = max(frame.time - origin, -math.inf if time is None else time)
        else:
            time = 0.0 if time is None else time + step
        yield time, frame
