"""Small media files for tests: frame i is a flat grey that tells i, whatever a codec does to it."""

import fractions
import io
import struct
import tarfile

import av
import numpy as np

STEP = 6  # grey levels between two frames


def greys(count, height=32, width=48):
    """Frames uint8 [f, h, w, 3]; frame i is of the grey `i * STEP`."""
    levels = (np.arange(count) * STEP).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def number_of(frames):
    """Which frames of `greys` these are: [..., h, w, 3] to integers [...]."""
    return np.round(np.asarray(frames, float).mean(axis=(-3, -2, -1)) / STEP).astype(int)


def write(path, frames, times=None, rate=8, codec="libx264", **options):
    """Writes frames at `times` in hundredths of a second, or at `rate` per second."""
    file = path if isinstance(path, io.BytesIO) else str(path)
    with av.open(file, "w", format="mp4" if file is path else None) as container:
        stream = container.add_stream(codec, rate=rate if times is None else 100)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", options
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if times is None:
                frame.pts, frame.time_base = index, fractions.Fraction(1, rate)
            else:
                frame.pts, frame.time_base = int(times[index]), fractions.Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def mp4_bytes(frames, **options):
    """The bytes of an mp4 file."""
    file = io.BytesIO()
    write(file, frames, **options)
    return file.getvalue()


def write_tar(path, members):
    """Writes `(name, bytes)` pairs in order, as webdataset's own writer does."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def gif_bytes(width, height, count, delay=200):
    """A GIF of `count` frames, each of a few bytes however large; `delay` in hundredths."""
    data = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    for i in range(count):
        data += b"\x21\xf9\x04\0" + struct.pack("<H", delay) + b"\0\0"
        data += b"\x2c" + struct.pack("<HHHHB", i % width, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\0"
    return data + b";"
