"""Video containers as FFmpeg opens them, checked for what it does not report itself."""

import contextlib
import os
from collections.abc import Iterator
from typing import IO, Any

import av
import av.error
import av.stream

from dicode_jax.errors import UserError, printable

# What the suffixes of `records.VIDEO_SUFFIXES` stand for, as FFmpeg calls it. It goes by what a
# file holds, not by its name: playlists, which read other files, and text drawn as a video are not
# among these, nor are pictures.
FORMATS = ("asf", "avi", "flv", "gif", "m4v", "matroska", "mov", "mpeg", "mpegts", "mpegvideo")
FORMATS += ("mxf", "ogg", "yuv4mpegpipe")
MAX_PIXELS = 2**26  # of a frame: 8K has half as many
_OPTIONS = {
    "format_whitelist": ",".join(FORMATS),
    "protocol_whitelist": "",  # no file is opened but the one that is handed over
    "max_pixels": str(MAX_PIXELS),
}
# These index their frames and fail by themselves when cut, or cannot tell at all.
_SELF_CHECKING = {"mov", "mp4", "gif", "mpegts"}
# Titles in another encoding do no harm: PyAV 19 keeps their bytes, earlier ones must be told.
_ANY_TITLE: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)


@contextlib.contextmanager
def open_container(file: str | IO[bytes], name: str | os.PathLike) -> Iterator[tuple[Any, Any]]:
    """Opens a file and gives `(container, stream)` of its moving picture.

    Args:
      file: a path, or an open file.
      name: what errors call it.

    Raises:
      UserError: the file cannot be opened or is of none of `FORMATS`; it holds no moving picture
        that can be decoded here; the frames have more than `MAX_PIXELS`; or FFmpeg or PyAV fails
        later inside the block.
    """
    try:
        with _handed_over(file) as source, _open(source, name) as container:
            streams = [s for s in container.streams.video if not _is_cover(s)]
            if not streams:
                kinds = {stream.type for stream in container.streams}
                what = "sound but no picture" if "audio" in kinds else "no picture"
                raise UserError(f"{name} holds {what}; give a video file")
            # The one that players take: a file may hold thumbnails or other angles before it.
            stream = max(streams, key=_is_default)
            if stream.codec_context is None:
                raise UserError(f"{name} is damaged, or of a codec that is not known here")
            check_size(name, stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            yield container, stream
    except UserError:
        raise
    except Exception as error:  # of many kinds: PyAV passes on what its own code meets
        reason = getattr(error, "strerror", None) or printable(error, 200) or type(error).__name__
        if isinstance(
            error, av.error.ArgumentError
        ):  # what FFmpeg says of frames that are too large
            reason += f"; or its frames have more than {MAX_PIXELS:,} pixels"
        raise UserError(
            f"{name} cannot be read as a video, or is cut short or damaged ({reason})"
        ) from error


@contextlib.contextmanager
def _handed_over(file: str | IO[bytes]) -> Iterator[IO[bytes]]:
    """The open file without its name, in which FFmpeg would see an address or a pattern."""
    if not isinstance(file, str):
        yield file
        return
    with open(file, "rb") as named, open(named.fileno(), "rb", closefd=False) as unnamed:
        yield unnamed


def _open(source: IO[bytes], name: str | os.PathLike) -> Any:
    try:
        return av.open(source, options=_OPTIONS, **_ANY_TITLE)
    except av.error.ArgumentError as error:  # what FFmpeg says of formats that are not listed
        raise UserError(
            f"{name} is not a video, or is damaged: it holds none of {', '.join(FORMATS)}"
        ) from error


def check_size(name: str | os.PathLike, width: int, height: int) -> None:
    """Refuses frames of more than `MAX_PIXELS`.

    Raises:
      UserError: they are larger.
    """
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name} has frames of {width} x {height}; at most {MAX_PIXELS:,} pixels are read"
        )


def check_index(name: str | os.PathLike, container, stream) -> int:
    """How many frames a file lists before it is read; it must be long enough to hold them.

    Raises:
      UserError: it has too few bytes.
    """
    size, entries = container.size, stream.index_entries
    if len(entries) > size:  # a few bytes can list millions of frames: they are not looked at
        raise UserError(f"{name} lists {len(entries):,} frames, and has {size:,} bytes")
    needed = max((entry.pos + entry.size for entry in entries), default=0)
    if needed > size:
        raise UserError(f"{name} is cut short: {size} of {needed} bytes are there")
    return len(entries)


def check_complete(
    name: str | os.PathLike,
    container,
    stream,
    *,
    listed: int,
    packets: int,
    end: float,
    step: float,
) -> None:
    """Compares what came with what the header promised, in formats that end silently when cut.

    Args:
      name: what the error calls the file.
      listed: what `check_index` said.
      packets: how many came of the moving picture.
      end: when the last of any stream was over, in seconds.
      step: seconds between two frames.

    Raises:
      UserError: something is missing.
    """
    if set(container.format.name.split(",")) & _SELF_CHECKING:
        return
    start = (container.start_time or 0) / av.time_base
    if stream.frames:
        # An avi counts dropped frames too: the one before them stays, and nothing is stored.
        there = stream.frames if packets >= listed > 1 else max(packets, (end - start) / step)
        if there < 0.98 * stream.frames - 1:
            raise UserError(f"{name} is cut short: {there:.0f} of {stream.frames} frames are there")
        return
    promised = (container.duration or 0) / av.time_base
    if promised - (end - start) > max(3 * step, 0.03 * promised):
        raise UserError(
            f"{name} is cut short: it ends after {end - start:.1f} of {promised:.1f} seconds"
        )


def _is_default(stream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.default)


def _is_cover(stream) -> bool:
    """Whether a video stream is only the picture on a sound file."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)
