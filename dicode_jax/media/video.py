"""Video files in and out: what `container` and Pillow let pass, and what `writer` writes.

Frames are uint8 RGB [h, w, 3]. Files are read one frame at a time, by time and not by number, so
that neither their length nor a variable frame rate matters.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import av
import av.error
import av.logging
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dicode_jax.errors import UserError
from dicode_jax.media.container import check_complete, check_index, open_container
from dicode_jax.media.picture import open_picture
from dicode_jax.media.record import COMMENT, KEY, from_text
from dicode_jax.media.sheet import contact_sheet as contact_sheet
from dicode_jax.media.sheet import in_cell as in_cell
from dicode_jax.media.shown import Shown, shown_picture
from dicode_jax.media.videos import Video, Videos
from dicode_jax.media.writer import DEFAULT_FPS, VideoWriter

KEYFRAME_INTERVAL = 2.0  # seconds
ROUNDING = 0.0051  # seconds; formats round time stamps, Matroska to thousandths, gif to hundredths

_LONGEST_GAP = 3600.0  # seconds between two frames, beyond which the time stamps are wrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a file: `image` uint8 [h, w, 3], on screen from `time`, in seconds."""

    image: UInt8[np.ndarray, "h w 3"]
    time: float
    duration: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a file says of itself; `duration` in seconds and `num_frames` where it knows them.

    `record` says how it was made, of an mp4 that was written here (see `media.record`).
    """

    width: int
    height: int
    fps: float | None
    duration: float | None
    num_frames: int | None
    record: Mapping[str, Any] | None = None


def iter_frames(path: str | os.PathLike) -> Iterator[Frame]:
    """Reads a file frame by frame, as `shown` says and all of the size of the first.

    Raises:
      UserError: there is no such file; it is empty, damaged or cut short, holds no moving picture,
        or only one frame.
    """
    path = _existing(path)
    frames = _webp_frames(path) if _is_webp(path) else _decoded_frames(path)
    first, shape, last_time, count = None, None, -math.inf, 0
    for frame in frames:
        first = frame.time if first is None else first
        shape = shape or frame.image.shape
        time = max(frame.time - first, last_time)  # a broken stamp must not turn time back
        if time - last_time > _LONGEST_GAP and count:
            raise UserError(f"{path} jumps by {time - last_time:.0f} s after {last_time:.1f} s")
        image = frame.image if frame.image.shape == shape else _resized(frame.image, shape)
        yield Frame(image=image, time=time, duration=frame.duration)
        last_time, count = time, count + 1
    if count < 2:
        what = "holds no frame" if count == 0 else "holds one frame only"
        raise UserError(f"{path} {what}; a video has at least two")


def read_video(path: str | os.PathLike) -> Video:
    """Reads all frames of a file into memory; see `iter_frames` for the errors.

    `times` are those of its frames in seconds, the first at 0, and `fps` is their mean rate.
    """
    frames = list(iter_frames(path))
    times = np.array([frame.time for frame in frames])
    return Video(
        frames=np.stack([frame.image for frame in frames]),
        fps=(len(times) - 1) / max(float(times[-1]), 1e-6),
        times=times,
    )


def iter_frames_at(path: str | os.PathLike, fps: float) -> Iterator[Frame]:
    """What is on screen at 0, 1 / fps, 2 / fps ... seconds; see `iter_frames` for the errors."""
    return at_rate(iter_frames(path), fps)


def at_rate(frames: Iterable[Frame], fps: float) -> Iterator[Frame]:
    """Which of the frames of a video are on screen at 0, 1 / fps, 2 / fps ... seconds."""
    count, shown, rounding = 0, None, 0.0
    for frame in frames:
        if shown is not None:
            rounding = rounding_of(frame.time - shown.time)
            while count / fps < frame.time - rounding:
                yield shown
                count += 1
        shown = frame
    if shown is not None and count / fps <= shown.time + rounding:
        yield shown


def rounding_of(step: float) -> float:
    """How far time stamps of frames that are `step` seconds apart may be off, in seconds."""
    return max(min(ROUNDING, step / 10), 1e-6)


def iter_keyframes(
    path: str | os.PathLike, mode: str = "every", *, interval: float = KEYFRAME_INTERVAL
) -> Iterator[Frame]:
    """Reads the keyframes of a file: two or more, so that clips lie between them.

    Args:
      path: any video file.
      mode: "every" takes what is on screen every `interval` seconds, and the last frame if the rest
        is more than half an interval; "demo" takes the first and the last frame of the file, as the
        original demo does.
      interval: seconds.

    Raises:
      UserError: as `iter_frames`, or an unknown mode.
    """
    if mode not in ("every", "demo"):
        raise UserError(f"unknown keyframes {mode!r}; choose one of: every, demo")
    if not (math.isfinite(interval) and interval > 0):
        raise UserError(f"the keyframe interval must be a positive number, got {interval}")
    if mode == "demo":
        frames = iter_frames(path)
        yield next(frames)
        for last in frames:  # noqa: B007
            pass
        yield last
        return
    yield from _keyframes_on_grid(iter_frames(path), interval)


def probe(path: str | os.PathLike) -> VideoInfo:
    """Reads what the file's header says, and one frame, which tells the size that is shown.

    Raises:
      UserError: as `iter_frames`, but for what comes after the first frame.
    """
    path = _existing(path)
    if _is_webp(path):
        with open_picture(path, path) as image:
            return VideoInfo(
                width=image.width,
                height=image.height,
                fps=None,
                duration=None,
                num_frames=getattr(image, "n_frames", 1),
            )
    with _opened(path) as (container, stream, _):
        shown = Shown(stream, path)
        frame = next(shown.frames(container.demux(stream)), None)
        if frame is None:
            raise UserError(f"{path} holds no frame; a video has at least two")
        height, width, _ = shown.pixels(frame).shape
        return VideoInfo(
            width=width,
            height=height,
            fps=float(stream.average_rate) if stream.average_rate else None,
            duration=_duration(container, stream),
            num_frames=stream.frames or None,
            record=from_text(container.metadata.get(COMMENT), path),
        )


def read_record(path: str | os.PathLike) -> Mapping[str, Any] | None:
    """How a picture was made, of a .png that was written here; else None.

    Raises:
      UserError: it is no picture.
    """
    with open_picture(_existing(path), path) as image:
        return from_text(getattr(image, "text", {}).get(KEY), path)


def write_video(
    path: str | os.PathLike,
    frames: Any,
    fps: float | None = None,
    *,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes .mp4, .gif or .webp (both repeat for ever), by extension; see `writer.VideoWriter`.

    The file appears when it is whole, and not at all on an error or Ctrl-C.

    Args:
      path: The file.
      frames: One video: uint8 `[f, h, w, 3]`, a `Video`, a batch of one, the path of a video file,
        or images one by one, as of a generator, of which one is held at a time (all for gif).
      fps: Frames per second; those of the `Video` or file by default, else 8.
      record: How it was made, which an mp4 keeps; that of the `Video` by default.

    Raises:
      UserError: The path cannot be written, see `files.check_output`; `fps` is no rate; there are
        several videos; or a file cannot be read.
      ValueError: No frames, or frames that are none.
    """
    sources: list[Any] = []
    if isinstance(frames, Videos):
        frames = frames.only
    if isinstance(frames, Video):
        fps = frames.fps if fps is None else fps
        record = frames.record if record is None else record
        frames = frames.frames
    elif isinstance(frames, str | os.PathLike):
        sources, info = [frames], probe(frames)
        rate = DEFAULT_FPS if not info.fps else min(info.fps, 1000.0)
        fps, record = (rate if fps is None else fps), (info.record if record is None else record)
        frames = (frame.image for frame in iter_frames_at(frames, fps))
    elif getattr(frames, "ndim", 0) == 5:
        if len(frames) != 1:
            raise UserError(f"there are {len(frames)} videos; write one, such as videos[0]")
        frames = frames[0]
    fps = DEFAULT_FPS if fps is None else fps
    with VideoWriter(path, fps, sources=sources, record=record) as writer:
        writer.append(frames)


# Reading


def _existing(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a video file")
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return path


@contextlib.contextmanager
def _opened(path: pathlib.Path):
    """The container, its moving picture, and how many frames of it are listed."""
    with open_container(str(path), path) as (container, stream):
        yield container, stream, check_index(path, container, stream)


def _decoded_frames(path: pathlib.Path) -> Iterator[Frame]:
    """Decodes the moving picture, with presentation times in seconds."""
    with _opened(path) as (container, stream, listed):
        if av.logging.get_level() is None:  # threads of frames that log wait for ever
            stream.thread_type = "AUTO"
        step = 1.0 / float(stream.average_rate or stream.guessed_rate or 25)
        packets, end = 0, 0.0

        def counted() -> Iterator[av.Packet]:
            nonlocal packets, end
            for packet in container.demux():
                if packet.pts is not None and packet.time_base is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream is stream:
                    packets += packet.size > 0
                    yield packet

        shown, time = Shown(stream, path), None
        for frame in shown.frames(counted()):
            after = 0.0 if time is None else time + step
            time = after if frame.time is None else frame.time
            lasts = frame.duration * (frame.time_base or 0)
            yield Frame(image=shown.pixels(frame), time=time, duration=float(lasts or step))
        _check_gif(path, container)
        check_complete(path, container, stream, listed=listed, packets=packets, end=end, step=step)


def _check_gif(path: pathlib.Path, container) -> None:
    if container.format.name != "gif":
        return
    with path.open("rb") as file:
        file.seek(-min(64, path.stat().st_size), os.SEEK_END)
        if not file.read().rstrip(b"\0\r\n ").endswith(b";"):
            raise UserError(f"{path} is cut short: the end of the animation is missing")


def _duration(container, stream) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def _is_webp(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def _webp_frames(path: pathlib.Path) -> Iterator[Frame]:
    """Reads an animated WebP with Pillow: FFmpeg does not know the format."""
    with path.open("rb") as file:
        promised = int.from_bytes(file.read(8)[4:], "little") + 8
    if path.stat().st_size < promised:
        raise UserError(f"{path} is cut short: {path.stat().st_size} of {promised} bytes are there")
    time = 0.0
    with open_picture(path, path) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            pixels = np.asarray(shown_picture(image))
            duration = (image.info.get("duration") or 100) / 1000
            yield Frame(image=pixels, time=time, duration=duration)
            time += duration


def _resized(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def _keyframes_on_grid(frames: Iterator[Frame], interval: float) -> Iterator[Frame]:
    """What is on screen at whole intervals, and the end if it is more than half of one later."""
    count, shown, steps, rounding = 0, next(frames), [], 0.0
    for frame in frames:
        steps = [*steps[-8:], frame.time - shown.time]
        rounding = rounding_of(steps[-1])
        while count * interval < frame.time - rounding:
            yield shown
            count += 1
        shown = frame
    if count * interval <= shown.time + rounding:
        yield shown
        count += 1
    lasts = min(shown.duration, 2 * statistics.median(steps))
    rest = shown.time + lasts - (count - 1) * interval
    if count < 2 or rest > interval / 2:
        yield shown
