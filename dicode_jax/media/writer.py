"""Videos to files as their frames come: mp4 (h264, crf 10, yuv420p), gif and webp, by extension.

What is held in memory does not grow with the length of a video whose writer is flushed.
"""

import contextlib
import fractions
import gc
import numbers
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, cast

import av
import av.error
import av.filter
import numpy as np
from jaxtyping import UInt8

from dicode_jax.errors import UserError
from dicode_jax.media.container import open_container
from dicode_jax.media.record import COMMENT, to_text
from dicode_jax.storage.files import atomic_path, check_output, growing_path, part_of

VIDEO_SUFFIXES = (".mp4", ".gif", ".webp")
DEFAULT_FPS = 8
H264_CRF = 10  # what the original demo writes with

_LOSSLESS_PIXELS = 128 * 128  # webp frames up to this size lose nothing


class VideoWriter:
    """A video file that frames are appended to; a context manager.

    Args:
      path: The file, with one of `VIDEO_SUFFIXES`. It appears at the end of the block, whole.
      fps: Frames per second.
      keep: Frames are written in sight, to `files.part_of(path)`, and when the block fails or is
        interrupted those up to the last `flush` stay there, playable, of which the exception gets
        a note. Otherwise no trace of them is left.
      sources: Files that the caller reads, which are not to be replaced.
      record: How the video is made, which an mp4 keeps; see `media.record`.

    Raises:
      UserError: The path cannot be written, see `files.check_output`; or `fps` is no rate.
      ValueError: At the end of the block: there were no frames.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: float = DEFAULT_FPS,
        *,
        keep: bool = False,
        sources: Iterable[str | os.PathLike] = (),
        record: Mapping[str, Any] | None = None,
    ):
        self._path = check_output(path, VIDEO_SUFFIXES, sources=sources)
        is_number = isinstance(fps, numbers.Real) and not isinstance(fps, bool)
        if not (is_number and 1e-3 <= fps <= 1000):
            raise UserError(f"fps must lie between 0.001 and 1000, got {str(fps)[:40]}")
        self._rate = fractions.Fraction(fps).limit_denominator(1001)
        self._keep = keep
        self._record = None if not record else to_text(record)
        self._stack = contextlib.ExitStack()
        self._format: _Mp4 | _Gif | _Webp | None = None
        self._shape: tuple[int, ...] = ()
        self._packets: list[av.Packet] = []
        self._count = self._flushed = self._whole = 0
        self._is_torn = False

    def __enter__(self) -> Self:
        return self

    def append(self, frames: Iterable[UInt8[np.ndarray, "h w 3"]]) -> None:
        """Adds frames, all of the size of the first; odd sizes get a repeated row or column in mp4.

        A generator is gone through frame by frame, and in gif alone the frames since the last
        `flush` are held, for the palette that they share.

        Raises:
          UserError: The file cannot be written.
          ValueError: What comes is no frame, or of another size.
        """
        for image in frames:
            image = _checked(image, self._shape)
            form = self._format or self._open(image.shape)
            frame = form.frame(image)
            frame.pts, frame.time_base = self._count, 1 / self._rate
            self._packets += form.encode(frame)
            self._count += 1
            if not self._keep:  # else a signal could part what belongs together
                self._mux()

    def flush(self) -> None:
        """Brings all frames so far into the file; the next ones begin anew, as after a cut."""
        if self._format is not None:
            self._packets += self._format.end()
            self._mux()
            self._flushed, self._whole = self._count, os.path.getsize(self._name)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._give_up(error)
            return
        try:
            if self._format is None:
                raise ValueError(f"no frames to write to {self._path}")
            self.flush()
            with self._told():
                self._format.close()
            self._stack.close()
        except BaseException as failed:
            self._give_up(failed)
            raise

    def _give_up(self, error: BaseException) -> None:
        if self._format is not None:
            with contextlib.suppress(av.error.FFmpegError):
                self._format.container.close()
            if self._is_torn:
                os.truncate(self._name, self._whole)
        self._stack.__exit__(type(error), error, error.__traceback__)
        if self._keep and self._flushed:
            seconds = float(self._flushed / self._rate)
            part = part_of(self._path)
            error.add_note(f"the first {seconds:g} s are in {part}; {self._path} is not written")

    def _open(self, shape: tuple[int, ...]) -> "_Mp4 | _Gif | _Webp":
        make = {".mp4": _Mp4, ".gif": _Gif, ".webp": _Webp}[self._path.suffix.lower()]
        context = growing_path if self._keep else atomic_path
        name = self._stack.enter_context(context(self._path))
        self._name = name.absolute()  # FFmpeg sees an address in `a:b.mp4`
        with self._told():
            self._format = form = make(self._name, self._rate, shape, self._keep)
            if self._record is not None and isinstance(form, _Mp4):
                form.container.metadata[COMMENT] = self._record
            self._shape = shape
            return form

    def _mux(self) -> None:
        packets, self._packets = self._packets, []
        with self._told():
            for packet in packets:
                packet.stream = cast(Any, self._format).stream
                cast(Any, self._format).container.mux(packet)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except av.error.FFmpegError as error:
            self._is_torn = True  # within a frame, as by a disk that is full
            raise UserError(f"cannot write {self._path}: {error.strerror or error}") from error


def _checked(frame: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(f"want frames uint8 [h, w, 3], got {frame.dtype} {list(frame.shape)}")
    if shape and frame.shape != shape:
        raise ValueError(f"frames differ in size: {list(shape)} and {list(frame.shape)}")
    return np.ascontiguousarray(frame)


class _Mp4:
    """Each flush ends an encoder, so that no frame waits in it for those of the next clip.

    A file that grows is made of fragments, one a frame, and plays however it ends; when it is whole
    its packets are laid out anew as those of any other, with the index in front.
    """

    def __init__(self, path: pathlib.Path, rate: fractions.Fraction, shape, grows: bool):
        self._path, self._grows = path, grows
        flags = "frag_every_frame+delay_moov+default_base_moof+skip_trailer"
        options = {"movflags": flags if grows else "+faststart", "flush_packets": str(int(grows))}
        self.container = av.open(str(path), "w", format="mp4", options=options)
        self._pad = ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0))
        self.stream = self.container.add_stream("libx264", rate=rate, options=self._options())
        self.stream.height, self.stream.width = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2
        self.stream.pix_fmt = "yuv420p"
        self._encoder: Any = self.stream.codec_context

    def frame(self, image: np.ndarray) -> av.VideoFrame:
        return av.VideoFrame.from_ndarray(np.pad(image, self._pad, mode="edge"), format="rgb24")

    def encode(self, frame: av.VideoFrame) -> list[av.Packet]:
        if self._encoder is None:
            first = self.stream.codec_context
            encoder = av.CodecContext.create("libx264", "w")
            for name in ("width", "height", "pix_fmt", "time_base", "framerate", "flags"):
                setattr(encoder, name, getattr(first, name))
            encoder.options = self._options()
            self._encoder = encoder
        return self._encoder.encode(frame)

    def end(self) -> list[av.Packet]:
        encoder, self._encoder = self._encoder, None
        return [] if encoder is None else encoder.encode(None)

    def close(self) -> None:
        self.container.close()
        if self._grows:
            with atomic_path(self._path) as temporary:
                _lay_out(self._path, temporary)

    def _options(self) -> dict[str, str]:
        return {"crf": str(H264_CRF)}


def _lay_out(source: pathlib.Path, target: pathlib.Path) -> None:
    """The same packets in an mp4 whose index comes first and is whole."""
    options = {"movflags": "+faststart"}
    reading, writing = (
        open_container(str(source), source),
        av.open(str(target), "w", "mp4", options=options),
    )
    with reading as (old, picture), writing as new:
        stream = new.add_stream_from_template(picture)
        new.metadata.update({key: old.metadata[key] for key in [COMMENT] if key in old.metadata})
        for packet in old.demux(picture):
            if packet.dts is not None:  # the last one is empty
                packet.stream = stream
                new.mux(packet)


class _Webp:
    """Whole frames, one by one: an encoder of animations would merge equal frames into one."""

    def __init__(self, path: pathlib.Path, rate: fractions.Fraction, shape, grows: bool):
        lossless = shape[0] * shape[1] <= _LOSSLESS_PIXELS
        options = {"lossless": "1"} if lossless else {"quality": "90"}
        self.container = av.open(str(path), "w", format="webp", options={"loop": "0"})
        self.stream = self.container.add_stream("libwebp", rate=rate, options=options)
        self.stream.height, self.stream.width, self.stream.pix_fmt = shape[0], shape[1], "bgra"

    def frame(self, image: np.ndarray) -> av.VideoFrame:
        return av.VideoFrame.from_ndarray(image, format="rgb24")

    def encode(self, frame: av.VideoFrame) -> list[av.Packet]:
        return self.stream.encode(frame)

    def end(self) -> list[av.Packet]:
        return []  # nothing waits in this encoder

    def close(self) -> None:
        self.container.close()


class _Gif:
    """One palette from flush to flush; times alternate so that the rate holds in hundredths."""

    def __init__(self, path: pathlib.Path, rate: fractions.Fraction, shape, grows: bool):
        self._shape, self._time_base = shape, 1 / rate
        self.container = av.open(str(path), "w", format="gif", options={"loop": "0"})
        self.stream = self.container.add_stream("gif", rate=rate)
        self.stream.height, self.stream.width, self.stream.pix_fmt = shape[0], shape[1], "pal8"
        self._graph: av.filter.Graph | None = None

    def frame(self, image: np.ndarray) -> av.VideoFrame:
        return av.VideoFrame.from_ndarray(image, format="rgb24")

    def encode(self, frame: av.VideoFrame) -> list[av.Packet]:
        self._graph = self._graph or self._palette_graph()
        self._graph.push(frame)
        return []

    def end(self) -> list[av.Packet]:
        packets: list[av.Packet] = []
        if self._graph is not None:
            self._graph.push(None)
            with contextlib.suppress(av.error.EOFError):
                while True:
                    packets += self.stream.encode(cast(av.VideoFrame, self._graph.pull()))
            self._graph = None
            gc.collect()  # PyAV 19's graphs and filters hold each other, and all their frames
        return packets

    def close(self) -> None:
        self.container.close()

    def _palette_graph(self) -> av.filter.Graph:
        graph, (h, w, _) = av.filter.Graph(), self._shape
        rgb = av.VideoFormat("rgb24")
        source = graph.add_buffer(width=w, height=h, format=rgb, time_base=self._time_base)
        split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=full")
        apply, sink = graph.add("paletteuse", "dither=sierra2_4a"), graph.add("buffersink")
        source.link_to(split)
        split.link_to(palette, 0, 0)
        split.link_to(apply, 1, 0)
        palette.link_to(apply, 0, 1)
        apply.link_to(sink)
        graph.configure()
        return graph
