"""Containers: which formats FFmpeg is let at, that it opens one file only, and what it claims."""

import ast
import fractions
import gc
import io
import os
import pathlib
import re
import struct
import types
import zlib

import av
import av.codec.context
import av.logging
import numpy as np
import pytest
from media_files import gif_bytes, greys, mp4_bytes, number_of, write
from PIL import Image

from dicode_jax.data import clips
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import VIDEO_SUFFIXES, MediaBytes, MediaFile, Record
from dicode_jax.errors import UserError
from dicode_jax.media import container, shown, video

ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(0)
HLS = b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\ngood.ts\n#EXT-X-ENDLIST\n"
DASH = b"""<?xml version="1.0"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S"
profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4">
<Representation id="1" bandwidth="9"><BaseURL>good.mp4</BaseURL></Representation></AdaptationSet>
</Period></MPD>"""
SDP = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
FOREIGN = {
    "ffconcat.mp4": b"ffconcat version 1.0\nfile good.mp4\n",
    "concat.ffconcat": b"ffconcat version 1.0\nfile good.mp4\n",
    "hls.mp4": HLS,
    "hls.m3u8": HLS,
    "dash.mp4": DASH,
    "dash.mpd": DASH,
    "sdp.mp4": SDP,
    "sdp.sdp": SDP,
    "text.txt": b"hello " * 500,
    "meta.mp4": b";FFMETADATA1\ntitle=x\n",
    "subtitles.mkv": b"1\n00:00:00,000 --> 00:00:02,000\nhello\n\n",
}


def record(path):
    suffix = os.path.splitext(path)[1]
    return Record(name="x", captions=(), media=MediaFile(path=str(path), suffix=suffix))


def in_memory(data):
    return Record(name="x", captions=(), media=MediaBytes(data=data, suffix=".mp4"))


def refused(path):
    """What all readers say of a file, of its bytes in memory too: one line each, a set."""
    readers = [
        lambda: video.probe(path),
        lambda: list(video.iter_frames(path)),
        lambda: clips.probe(record(path)),
        lambda: clips.read_frame(in_memory(path.read_bytes()), DataConfig(), 8, RNG),
    ]
    lines = set()
    for read in readers:
        with pytest.raises(UserError) as caught:
            read()
        assert "\n" not in str(caught.value)
        lines.add(str(caught.value).removeprefix(str(path)).removeprefix("x").strip(": "))
    return lines


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, where what playlists name lies."""
    monkeypatch.chdir(tmp_path)
    write("good.mp4", greys(4))
    write("good.ts", greys(4), rate=25, codec="mpeg2video")
    return tmp_path


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_listed_format_is_refused(folder, name):
    (folder / name).write_bytes(FOREIGN[name])
    for line in refused(folder / name):
        assert re.match("is not a video, or is damaged: it holds none of |cannot be read as", line)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP"])
def test_a_picture_under_a_name_of_a_video_is_refused_by_one_line(tmp_path, kind):
    Image.fromarray(greys(3)[2]).save(tmp_path / "a.mp4", kind)
    (line,) = refused(tmp_path / "a.mp4")
    assert line == f"is not a video, or is damaged: it holds none of {', '.join(container.FORMATS)}"


def test_ffmpeg_itself_would_read_the_neighbour(folder):
    """So that the test above can fail."""
    (folder / "a.mp4").write_bytes(FOREIGN["ffconcat.mp4"])
    with av.open("a.mp4") as opened:
        assert len(list(opened.decode(video=0))) == 4


CODECS = {".y4m": "wrapped_avframe", ".ogv": "libvpx", ".webm": "libvpx", ".gif": "gif"}
CODECS |= {".3gp": "mpeg4", ".m4v": "mpeg4", ".wmv": "wmv2", ".flv": "flv1"}


def test_the_formats_are_those_of_the_suffixes(tmp_path):
    """Each suffix is read, also as the bare stream that may bear it, and no format is left."""
    kinds = dict.fromkeys(VIDEO_SUFFIXES)
    kinds |= {".mpg": "mpeg1video", ".m4v": "m4v"}
    found = set()
    for name in [*((suffix, None) for suffix in VIDEO_SUFFIXES), *kinds.items()]:
        suffix, kind = name
        path = tmp_path / f"a{suffix}"
        codec = "mpeg1video" if kind == "mpeg1video" else CODECS.get(suffix, "mpeg2video")
        with av.open(str(path), "w", format=kind) as out:
            stream = out.add_stream("flv" if codec == "flv1" else codec, rate=25)
            stream.width, stream.height = 48, 32
            stream.pix_fmt = "rgb8" if suffix == ".gif" else "yuv420p"
            for image in greys(16):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                out.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
            out.mux(stream.encode(None))
        assert video.probe(path).width == 48, suffix
        assert clips.probe(record(path)).num_frames == 16, suffix
        with container.open_container(str(path), path) as (opened, _):
            found |= set(opened.format.name.split(",")) & set(container.FORMATS)
    assert found == set(container.FORMATS)


@pytest.mark.parametrize("name", ["a%d.jpg", "a%03d.gif", "file:b.gif", "b.gif:c", "-b.gif", "[a]"])
def test_the_file_of_that_name_is_opened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for other in ("a0.jpg", "a1.jpg", "a000.gif", "b.gif"):
        Image.new("RGB", (7, 5)).save(other)
    pathlib.Path(name).write_bytes(mp4_bytes(greys(4)))
    assert video.probe(name).width == 48
    assert number_of(video.read_video(name).frames).tolist() == [0, 1, 2, 3]
    media = MediaFile(path=name, suffix=".mp4")
    assert clips.probe(Record(name="x", captions=(), media=media)).num_frames == 4


def test_every_video_is_opened_with_the_one_list():
    calls = []
    for folder in ("dicode_jax", "train", "convert", "configs", "scripts", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(), str(path))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "av.open":
                    writes = any(getattr(part, "value", None) == "w" for part in node.args)
                    calls += [] if writes else [ast.unparse(node)]
    assert calls == ["av.open(source, options=_OPTIONS, **_ANY_TITLE)"]


def test_a_codec_that_is_not_known_is_said(tmp_path):
    data = mp4_bytes(greys(4))
    assert data.count(b"avc1") == 2  # a brand, and the codec
    at = data.rindex(b"avc1")
    (tmp_path / "a.mp4").write_bytes(data[:at] + b"zzzz" + data[at + 4 :])
    assert refused(tmp_path / "a.mp4") == {"is damaged, or of a codec that is not known here"}


class TestSizes:
    """A few bytes can claim much; it is refused before it is made room for."""

    def test_the_largest_frames(self):
        container.check_size("x", 7680, 7680)
        container.check_size("x", 8192, 8192)
        with pytest.raises(UserError, match=r"^x has frames of 8192 x 8193; at most 67,108,864 "):
            container.check_size("x", 8192, 8193)

    @pytest.mark.parametrize("size", [(8193, 8192), (16000, 16000), (65535, 65535)])
    def test_in_the_header(self, tmp_path, size):
        (tmp_path / "a.gif").write_bytes(gif_bytes(*size, 2))
        for line in refused(tmp_path / "a.gif"):
            assert re.search("more than 67,108,864 pixels|at most 67,108,864 pixels", line)

    def test_in_the_middle(self, tmp_path):
        """A PNG among others says that it is larger."""
        file = io.BytesIO()
        Image.fromarray(greys(1)[0]).save(file, "PNG")
        small = file.getvalue()
        head = b"IHDR" + struct.pack(">II", 16000, 16000) + small[24:29]
        large = small[:12] + head + struct.pack(">I", zlib.crc32(head)) + small[33:]
        write_packets(tmp_path / "a.mov", [small, small, small, large], "png", "rgb24")
        reads = (
            lambda: list(video.iter_frames(tmp_path / "a.mov")),
            lambda: clips.read_overview(record(tmp_path / "a.mov"), 4),
        )
        for read in reads:
            with pytest.raises(UserError, match="more than 67,108,864 pixels"):
                read()

    @pytest.mark.parametrize(
        ("aspect", "width"),
        [((3, 2), 72), ((1, 65535), 1), ((0, 0), 96), ((0, 5), 96), ((5, 0), 96), ((65535, 1), 0)],
    )
    def test_of_pixels_that_are_no_squares(self, tmp_path, aspect, width):
        path = tmp_path / "a.mp4"
        with av.open(str(path), "w") as out:
            stream = out.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            stream.codec_context.sample_aspect_ratio = fractions.Fraction(2)
            for image in greys(3):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        data = path.read_bytes()
        at = data.index(b"pasp") + 4
        path.write_bytes(data[:at] + struct.pack(">II", *aspect) + data[at + 8 :])
        if width:
            assert video.read_video(path).frames.shape == (3, 32, width, 3)
        else:
            with pytest.raises(UserError, match="has frames of 3145680 x 32; at most 67,108,864 "):
                video.read_video(path)

    def test_of_an_index(self, tmp_path):
        data = mp4_bytes(greys(4))
        many = 30000
        for kind, was, now in (
            (b"stsz", (0, 4), (1, many)),  # the size of all, and how many
            (b"stts", (1, 4), (1, many)),
            (b"stsc", (1, 1, 4), (1, 1, many)),
        ):
            at, form = data.index(kind) + 8, f">{len(was)}I"
            end = at + struct.calcsize(form)
            assert struct.unpack(form, data[at:end]) == was
            data = data[:at] + struct.pack(form, *now) + data[end:]
        (tmp_path / "a.mp4").write_bytes(data)
        assert refused(tmp_path / "a.mp4") == {f"lists 30,000 frames, and has {len(data):,} bytes"}

    def test_entries_beyond_the_bytes_are_not_gone_through(self):
        class Entries(list):
            def __len__(self):
                return 10**9

            def __iter__(self):
                raise AssertionError("gone through")

        held = types.SimpleNamespace(size=3664)
        stream = types.SimpleNamespace(index_entries=Entries())
        with pytest.raises(UserError, match=r"^x lists 1,000,000,000 frames, and has 3,664 bytes$"):
            container.check_index("x", held, stream)


ODD = [NotImplementedError("two\nlines"), MemoryError(), struct.error("short"), EOFError()]
ODD += [KeyError(3), RecursionError("deep"), AttributeError("x" * 10000), ZeroDivisionError("0")]
ODD += [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), OSError(5, "Input/output error")]


@pytest.mark.parametrize("error", ODD, ids=lambda error: type(error).__name__)
def test_whatever_pyav_raises_is_one_line(tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise error

    write(tmp_path / "a.mp4", greys(4))
    for place in ("av.open", "dicode_jax.media.shown.Shown.pixels"):
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            for read in (video.read_video, lambda path: clips.read_overview(record(path), 2)):
                with pytest.raises(UserError, match=r"cut short or damaged \(.+\)$") as caught:
                    read(tmp_path / "a.mp4")
                assert "\n" not in str(caught.value)
                assert len(str(caught.value)) < 600


def test_no_frame_stays_in_memory(tmp_path):
    """Until Python looks for circles, which it does seldom where little but arrays is made."""
    write(tmp_path / "a.mp4", greys(40), rate=25)
    gc.collect()
    # By their types: to ask torch's lazy objects for a class warns.
    count = lambda: sum(issubclass(type(x), av.VideoFrame) for x in gc.get_objects())  # noqa: E731
    before = count()
    gc.disable()
    try:
        for _ in video.iter_frames(tmp_path / "a.mp4"):
            pass
        clips.read_overview(record(tmp_path / "a.mp4"), 40)
        after = count()
    finally:
        gc.enable()
    assert after <= before + 2


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_frames_with_notes_that_pyav_does_not_know_are_read(tmp_path, orientation, turns):
    """EXIF in each JPEG, as cameras write it."""
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :24] = 255
    write_packets(tmp_path / "a.mov", [jpeg(image, orientation)] * 3, "mjpeg", "yuvj420p")
    for frame in video.read_video(tmp_path / "a.mov").frames:
        np.testing.assert_allclose(frame, np.rot90(image, turns), atol=40)


def test_frames_are_not_threaded_while_pyav_logs(tmp_path, monkeypatch):
    """Threads that log wait for Python, and it for them: damaged files never ended."""
    seen = []

    class Noting(shown.Shown):
        def __init__(self, stream, name):
            seen.append(bool(stream.thread_type & av.codec.context.ThreadType.FRAME))
            super().__init__(stream, name)

    write(tmp_path / "a.mp4", greys(4))
    monkeypatch.setattr(video, "Shown", Noting)
    assert av.logging.get_level() is None
    video.read_video(tmp_path / "a.mp4")
    try:
        av.logging.set_level(av.logging.PANIC)
        video.read_video(tmp_path / "a.mp4")
    finally:
        av.logging.set_level(None)
    assert seen == [True, False]


def jpeg(image, orientation):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(image).save(file, "JPEG", exif=exif)
    return file.getvalue()


def write_packets(path, pictures, codec, pix_fmt):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, pix_fmt
        for index, data in enumerate(pictures):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts = stream, index, index
            packet.time_base = fractions.Fraction(1, 8)
            out.mux(packet)
