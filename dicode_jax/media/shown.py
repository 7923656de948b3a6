"""What a file means to show, from what its decoder gives: both readers and all pictures ask here.

Upright, mirrored where the file says so, with square pixels, whole frames instead of fields, in
the 8 bits of an ordinary screen, and on white where there is transparency. FFmpeg's filters turn
and scale. Its builds for PyAV have no `zscale`, and `scale` takes seconds per file to bring HDR to
an ordinary screen, so that is done here.
"""

import contextlib
import functools
import logging
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, cast

import av
import av.error
import av.filter
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from jaxtyping import UInt8
from PIL import Image, ImageOps

from dicode_jax.errors import UserError
from dicode_jax.media.container import check_size

_log = logging.getLogger(__name__)

BACKGROUND = (255, 255, 255)  # behind what is transparent; gif decoders take it too
_PQ, _HLG = 16, 18  # transfer functions, as H.273 numbers them
_REFERENCE_WHITE = 203  # cd/m2 (ITU-R BT.2408): it becomes white, and what is brighter is clipped
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Light of the primaries of BT.2020 in those of BT.709 (ITU-R BT.2087).
_TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)


def shown_picture(image: Image.Image) -> Image.Image:
    """A picture the way up that its camera says, RGB of 8 bits, transparency on `BACKGROUND`.

    Raises:
      UserError: its numbers are no levels of 8 or 16 bits, so that nobody knows what is white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # greys beyond 8 bits, which Pillow would clip to those
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise UserError("its greys are not of 8 or 16 bits; save it as one of these")
        levels = (grey.astype(np.int64) + 128) // 257
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image).convert("RGB")


class Shown:
    """Frames of one stream as they are to be seen; warnings call the file `name`."""

    def __init__(self, stream, name: str | os.PathLike):
        self._name = name
        self._aspect = float(stream.sample_aspect_ratio or 1)
        self._key: tuple | None = None
        self._graph: av.filter.Graph | None = None
        self._decoder: av.VideoCodecContext | None = None
        tags = {key.lower(): value for key, value in stream.metadata.items()}
        if tags.get("alpha_mode") == "1":  # FFmpeg's own decoders pass over it
            codec = _WITH_ALPHA.get(stream.codec_context.name)
            if codec in av.codecs_available:
                self._decoder = cast(av.VideoCodecContext, av.CodecContext.create(codec, "r"))
                self._decoder.thread_count = stream.codec_context.thread_count
            else:
                _warn(name, "is transparent, which FFmpeg does not decode here")

    def frames(self, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
        """Decodes the stream's packets; frames of two fields are deinterlaced and keep their time.

        Raises:
          av.error.FFmpegError: from the decoder.
        """
        graph, key = None, None
        for frame in self._decoded(packets):
            here = (frame.width, frame.height, frame.format.name, frame.time_base)
            if graph is not None and here != key:
                graph = yield from _pull(graph)
            if graph is None and frame.interlaced_frame:
                if "bwdif" in av.filter.filters_available:
                    graph, key = _make_graph(frame, "bwdif=mode=send_frame:deint=interlaced"), here
                else:
                    _warn(self._name, "is interlaced, and FFmpeg has no bwdif here")
            if graph is None:
                yield frame
                continue
            graph.push(frame)
            with contextlib.suppress(av.error.BlockingIOError):
                yield cast(av.VideoFrame, graph.pull())
        if graph is not None:
            yield from _pull(graph)

    def _decoded(self, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
        for packet in packets:
            if self._decoder is None:
                yield from cast(list[av.VideoFrame], packet.decode())
            else:
                yield from self._decoder.decode(packet if packet.size else None)

    def pixels(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
        """A frame in RGB; `h` and `w` are those of the screen."""
        steps = _turns(*_display_matrix(frame))
        width = max(1, round(frame.width * self._aspect))
        check_size(self._name, width, frame.height)
        if width != frame.width:
            steps = [f"scale=w={width}:h={frame.height}", *steps]
        alpha = any(component.is_alpha for component in frame.format.components)
        transfer, primaries = frame.color_trc, frame.color_primaries
        hdr = transfer in (_PQ, _HLG)
        kind = ("rgba64le" if alpha else "rgb48le") if hdr else ("rgba" if alpha else "rgb24")
        if steps:
            key = (frame.width, frame.height, frame.format.name, frame.colorspace)
            key += (frame.color_range, *steps)
            if key != self._key or self._graph is None:
                self._key = key
                self._graph = _make_graph(frame, *steps, f"format={kind}")
            self._graph.push(frame)
            frame = cast(av.VideoFrame, self._graph.pull())
        pixels = frame.to_ndarray(format=kind)
        if hdr:
            rgb = _to_sdr(pixels[..., :3], transfer, wide=primaries in (2, 9))  # 2: not told
            pixels = np.concatenate([rgb, (pixels[..., 3:] // 257).astype(np.uint8)], axis=-1)
        return np.asarray(shown_picture(Image.fromarray(pixels))) if alpha else pixels


@functools.cache
def _light(transfer: int) -> np.ndarray:
    """Light of a signal of 16 bits: 1 is reference white in PQ, the brightest of a scene in HLG."""
    x = np.arange(65536) / 65535
    if transfer == _PQ:  # SMPTE ST 2084
        x = x ** (32 / 2523)
        light = np.maximum(x - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * x)
        light = 10000 / _REFERENCE_WHITE * light ** (16384 / 2610)
    else:  # ARIB STD-B67
        light = np.where(
            x <= 0.5, x**2 / 3, (np.exp((x - 0.55991073) / 0.17883277) + 0.28466892) / 12
        )
    return light.astype(np.float32)


def _to_sdr(signal: np.ndarray, transfer: int, *, wide: bool) -> np.ndarray:
    """A signal uint16 [h, w, 3] for an ordinary screen (gamma 2.4, ITU-R BT.1886), uint8."""
    light = _light(transfer)[signal]
    if transfer == _HLG:  # as a screen of 1000 cd/m2 shows the scene (ITU-R BT.2100)
        scene = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= 1000 / _REFERENCE_WHITE * scene[..., None] ** 0.2
    light = light @ _TO_709.T if wide else light
    return np.rint(255 * light.clip(0, 1) ** (1 / 2.4)).astype(np.uint8)


def _display_matrix(frame: av.VideoFrame) -> tuple[float, float, float, float]:
    """The a, b, c and d of x' = a x + c y, y' = b x + d y."""
    try:  # not `frame.side_data`: it and the frame hold each other, and the frame stays in memory
        matrix = cast(Any, SideDataContainer)(frame).get("DISPLAYMATRIX")
    except ValueError:  # PyAV 18 fails on notes that it does not know, such as EXIF
        angle = math.radians(frame.rotation)  # without mirrors
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = map(float, np.frombuffer(matrix, np.int32)[:5])
    return a, b, c, d


def _turns(a: float, b: float, c: float, d: float) -> list[str]:
    """Filters for a display matrix: quarter turns and mirrors, what is nearest to it."""
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    along, down = (c, b) if turned else (a, d)
    steps = ["transpose=cclock_flip"] * turned  # exchanges x and y
    return steps + ["hflip"] * (along < 0) + ["vflip"] * (down < 0)


def _make_graph(frame: av.VideoFrame, *steps: str) -> av.filter.Graph:
    """Filters in a row, for frames like this one."""
    base = frame.time_base or "1/25"
    graph = av.filter.Graph()
    source = (
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={base}"
        f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
    )
    nodes = [graph.add("buffer", source)]
    for step in steps:
        name, _, options = step.partition("=")
        nodes.append(graph.add(name, options))
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    return graph


def _pull(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    """What filters still hold."""
    graph.push(None)
    with contextlib.suppress(av.error.EOFError):
        while True:
            yield cast(av.VideoFrame, graph.pull())


@functools.lru_cache
def _warn(name: str | os.PathLike, what: str) -> None:
    """Once per file and process."""
    _log.warning("%s %s; it is read as if it were not", name, what)
