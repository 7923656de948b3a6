"""Video containers as FFmpeg opens them, checked for what it does not report itself."""

import contextlib
import os
from typing import IO, Any

import av
import av.error
import av.stream

from dicode_jax.errors import UserError

# FFmpeg opens any .txt as a video of its letters; that is not what anyone means here.
_TEXT_FORMATS = {"tty", "bin", "xbin", "adf", "idf"}
# These index their frames and fail by themselves when cut, or cannot tell at all.
_SELF_CHECKING = {"mov", "mp4", "gif", "mpegts"}
# Titles in another encoding do no harm: PyAV 19 keeps their bytes, earlier ones must be told.
_ANY_TITLE: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)


@contextlib.contextmanager
def open_container(file: str | IO[bytes], name: str | os.PathLike):
    """Opens a file and gives `(container, stream)` of its moving picture.

    Args:
      file: a path, or an open file.
      name: what errors call it.

    Raises:
      UserError: FFmpeg or PyAV cannot open the file, or fails later inside the block; or it holds
        no moving picture.
    """
    try:
        options = {"protocol_whitelist": "file"}  # nothing that a playlist names is fetched
        if isinstance(file, str):  # FFmpeg takes what stands before a colon for a protocol
            file = os.path.abspath(file)
        with av.open(file, options=options, **_ANY_TITLE) as container:
            streams = [s for s in container.streams.video if not _is_cover(s)]
            if container.format.name in _TEXT_FORMATS:
                raise UserError(f"{name} is a text file, not a video")
            if not streams:
                kinds = {stream.type for stream in container.streams}
                what = "sound but no picture" if "audio" in kinds else "no picture"
                raise UserError(f"{name} holds {what}; give a video file")
            # The one that players take: a file may hold thumbnails or other angles before it.
            yield container, max(streams, key=_is_default)
    except UserError:
        raise
    except (av.error.FFmpegError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"{name} cannot be read as a video, or is cut short or damaged "
            f"({reason or type(error).__name__})"
        ) from error


def check_index(name: str | os.PathLike, stream, size: int) -> int:
    """How many frames a file lists before it is read; it must be long enough to hold them.

    Raises:
      UserError: its `size` bytes are too few.
    """
    needed = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if needed > size:
        raise UserError(f"{name} is cut short: {size} of {needed} bytes are there")
    return len(stream.index_entries)


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
