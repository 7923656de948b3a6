"""What a file means to show is what both readers give: made files whose right picture is known."""

import fractions
import pathlib

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from dicode_jax.data import clips
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import VIDEO_SUFFIXES, BrokenRecord, MediaFile, Record, suffix_of
from dicode_jax.media import video

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


def quarters(height=24, width=40):
    """Red and green above blue and black, uint8 [h, w, 3]."""
    image = np.zeros((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    image[:h, :w], image[:h, w:], image[h:, :w] = RED, GREEN, BLUE
    return image


def encode(path, frames, codec, pix_fmt, prepare=lambda stream: None, **options):
    """Writes frames at 25 a second; `prepare` sees the stream before."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, pix_fmt
        prepare(stream)
        for index, frame in enumerate(frames):
            frame.pts, frame.time_base = index, fractions.Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def record(path):
    media = MediaFile(path=str(path), suffix=suffix_of(str(path)))
    return Record(name=pathlib.Path(path).name, captions=(), media=media)


def both(path):
    """All frames as the commands read them, which must be those that training reads."""
    frames = video.read_video(path).frames
    info, told = clips.probe(record(path)), video.probe(path)
    assert (info.height, info.width) == (told.height, told.width) == frames.shape[1:3]
    trained = clips.read_overview(record(path), len(frames), frames.shape[1])
    np.testing.assert_array_equal(trained, frames)
    return frames


def corners(image):
    """The main colour of each quarter: top left, top right, bottom left, bottom right."""
    h, w = image.shape[:2]
    places = [
        (h // 4, w // 4),
        (h // 4, 3 * w // 4),
        (3 * h // 4, w // 4),
        (3 * h // 4, 3 * w // 4),
    ]
    return [tuple((255 * (image[place] > 127)).tolist()) for place in places]


@pytest.mark.parametrize(
    ("matrix", "wanted"),
    [  # x' = a x + c y, y' = b x + d y
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
        ((1, 0, 0, -1), lambda image: image[::-1]),
        ((-1, 0, 0, -1), lambda image: image[::-1, ::-1]),
        ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),  # clockwise
        ((0, -1, 1, 0), np.rot90),
        ((0, -1, -1, 0), lambda image: np.rot90(image, 2).swapaxes(0, 1)),
    ],
)
def test_a_display_matrix_turns_and_mirrors(tmp_path, matrix, wanted):
    a, b, c, d = (65536 * n for n in matrix)
    frames = [av.VideoFrame.from_ndarray(quarters(), format="rgb24") for _ in range(3)]
    nine = [a, b, 0, c, d, 0, 0, 0, 2**30]
    encode(tmp_path / "a.mp4", frames, "mpeg4", "yuv420p", lambda s: s.set_display_matrix(nine))
    image, upright = both(tmp_path / "a.mp4")[0], wanted(quarters())
    assert image.shape == upright.shape
    assert corners(image) == corners(upright)


@pytest.mark.parametrize(("aspect", "width"), [((64, 45), 57), ((8, 9), 36)])
def test_a_circle_stays_a_circle(tmp_path, aspect, width):
    def squeeze(stream):
        stream.codec_context.sample_aspect_ratio = fractions.Fraction(*aspect)

    frames = [av.VideoFrame.from_ndarray(quarters(), format="rgb24") for _ in range(3)]
    encode(tmp_path / "a.mp4", frames, "libx264", "yuv420p", squeeze)
    image = both(tmp_path / "a.mp4")[0]
    assert image.shape == (24, width, 3)
    assert corners(image) == corners(quarters())


def test_what_is_transparent_is_white_in_videos(tmp_path):
    pixels = np.zeros((24, 40, 4), np.uint8)
    pixels[..., 1], pixels[:, :20, 3], pixels[:12, 20:, 3] = 200, 255, 102
    frames = [av.VideoFrame.from_ndarray(pixels, format="rgba") for _ in range(3)]
    encode(tmp_path / "a.mov", frames, "qtrle", "argb")
    image = both(tmp_path / "a.mov")[0]
    assert image[5, 5].tolist() == [0, 200, 0]
    assert image[5, 30].tolist() == [153, 233, 153]  # 2/5 of it, 3/5 white
    assert image[20, 30].tolist() == [255, 255, 255]


def test_what_is_transparent_is_white_in_pictures(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 1], pixels[:, :4, 3] = 200, 255
    picture = Image.fromarray(pixels)
    upside_down = Image.fromarray(pixels[:, ::-1])
    with_palette = picture.convert("RGB").quantize(4)
    with_palette.info["transparency"] = with_palette.getpixel((7, 0))
    picture.save(tmp_path / "a.png")
    with_palette.save(tmp_path / "b.png")
    picture.save(tmp_path / "c.webp", save_all=True, append_images=[upside_down], lossless=True)
    Image.fromarray(pixels[..., 2:]).save(tmp_path / "d.png")  # grey with alpha
    (a,), (b,), (d,) = (clips.read_overview(record(tmp_path / f"{n}.png"), 1, 8) for n in "abd")
    c = video.read_video(tmp_path / "c.webp").frames[0]
    assert (a[0, 0].tolist(), a[0, 7].tolist()) == ([0, 200, 0], [255, 255, 255])
    assert (b == 255).all()
    np.testing.assert_array_equal(c, a)
    assert (d[0, 0].tolist(), d[0, 7].tolist()) == ([0, 0, 0], [255, 255, 255])


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_grey_ramp_of_16_bits_keeps_its_levels(tmp_path, name):
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)
    Image.fromarray(np.tile(ramp, (16, 1))).save(tmp_path / name)
    (read,) = clips.read_overview(record(tmp_path / name), 1, 16)
    np.testing.assert_array_equal(read[0, :, 0], np.round(ramp / 257))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_greys_without_a_known_white_are_refused(tmp_path, dtype):
    Image.fromarray(np.full((4, 4), 70000, dtype)).save(tmp_path / "a.tif")
    with pytest.raises(BrokenRecord, match=r"a\.tif.*not of 8 or 16 bits"):
        clips.read_overview(record(tmp_path / "a.tif"), 1)


def pq(light):
    """SMPTE ST 2084: the signal of a light in cd/m2."""
    y = (light / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


@pytest.mark.parametrize(
    ("transfer", "signal", "grey"),
    [
        (16, pq(203), 255),
        (16, pq(203 * (190 / 255) ** 2.4), 190),  # as a screen of gamma 2.4 shows 75 % white
        (16, pq(1000), 255),
        (18, 0.75, 255),  # HLG's reference white
    ],
)
def test_hdr_is_brought_to_an_ordinary_screen(tmp_path, transfer, signal, grey):
    def tag(thing):
        thing.color_trc, thing.color_primaries = transfer, 9
        thing.colorspace, thing.color_range = 9, 1

    planes = np.full((36, 32), 512, np.uint16)
    planes[:24] = round(64 + 876 * signal)
    frames = [av.VideoFrame.from_ndarray(planes, format="yuv420p10le") for _ in range(3)]
    list(map(tag, frames))
    path = tmp_path / "a.mkv"
    encode(path, frames, "ffv1", "yuv420p10le", lambda stream: tag(stream.codec_context))
    np.testing.assert_allclose(both(path), grey, atol=2)  # levels, of tables of 10 bits


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.ts", "mpeg2video", {"flags": "+ilme+ildct", "qmax": "2"}),
        ("a.mp4", "libx264", {"x264-params": "interlaced=1:tff=1", "crf": "5"}),
    ],
)
def test_fields_become_whole_frames(tmp_path, name, codec, options, monkeypatch, caplog):
    def bar(time):
        image = np.full((96, 128, 3), 30, np.uint8)
        image[:, 16 + 4 * time : 48 + 4 * time] = 220
        return image

    frames = []
    for time in range(0, 16, 2):
        woven = bar(time + 1)
        woven[1::2] = bar(time)[1::2]  # the lower field comes first, which is what PyAV tells
        frames.append(av.VideoFrame.from_ndarray(woven, format="rgb24"))
    encode(tmp_path / name, frames, codec, "yuv420p", **options)
    read = both(tmp_path / name).astype(int)
    assert len(read) == len(frames)
    np.testing.assert_allclose(video.read_video(tmp_path / name).times, np.arange(8) / 25)
    combed = np.abs(np.diff(read[:, 8:-8], axis=1)).max(axis=(1, 2, 3))
    assert combed.max() < 60
    for index, image in enumerate(read):  # each of them at the time of its first field
        assert np.abs(image - bar(2 * index)).mean() < 6
    monkeypatch.setattr(av.filter, "filters_available", {"scale"})
    woven = both(tmp_path / name).astype(int)
    assert np.abs(np.diff(woven[:, 8:-8], axis=1)).max() > 120
    assert [line for line in caplog.messages if "interlaced" in line]


def test_the_stream_flagged_as_default_is_read(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in range(2)]
        for stream, (height, width) in zip(streams, [(16, 32), (24, 40)], strict=True):
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        streams[0].disposition, streams[1].disposition = Disposition(0), Disposition.default
        for index in range(3):
            for stream in streams:
                image = quarters(stream.height, stream.width)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = index, fractions.Fraction(1, 25)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    assert both(tmp_path / "a.mkv").shape == (3, 24, 40, 3)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_the_transparency_of_webm_is_decoded_or_said_once(tmp_path, codec, monkeypatch, caplog):
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[..., 0], pixels[:, :32, 3] = 255, 255
    path = tmp_path / f"{codec}.webm"
    frames = [av.VideoFrame.from_ndarray(pixels, format="rgba") for _ in range(3)]
    encode(path, frames, codec, "yuva420p", **{"auto-alt-ref": "0"})
    white = (255, 255, 255)
    assert corners(both(path)[-1]) == [RED, white, RED, white]
    assert not caplog.messages
    monkeypatch.setattr(av, "codecs_available", set())
    for _ in range(2):
        assert corners(both(path)[-1]) == [RED] * 4
    names = [line.split(" is transparent")[0] for line in caplog.messages]
    assert sorted(names) == [str(path), path.name]  # the name in each reader


def test_frames_after_the_last_key_picture_are_read(tmp_path):
    greys = np.repeat(np.arange(50, dtype=np.uint8) * 4, 32 * 48 * 3).reshape(50, 32, 48, 3)
    frames = [av.VideoFrame.from_ndarray(image, format="rgb24") for image in greys]
    encode(tmp_path / "a.ts", frames, "libx264", "yuv420p", g="250")
    read = both(tmp_path / "a.ts")
    assert len(read) == 50
    (last,) = clips.read_frame(
        record(tmp_path / "a.ts"),
        DataConfig(clip_start="center"),
        8,
        np.random.default_rng(0),
    )["image"][None]
    for targets in ([1.2], [1.96], [1.5, 1.9]):
        with clips._reader(record(tmp_path / "a.ts")) as reader:
            (*_, image) = reader.frames_at(np.array(targets), np.asarray)
        np.testing.assert_array_equal(image, read[int(targets[-1] * 25 + 0.01)])
    assert abs(int(last.mean()) - 4 * 24) <= 5


def test_dropped_frames_of_an_avi_are_no_damage(tmp_path):
    slots = [*range(8), 20, 21, 60]
    greys = np.repeat(np.arange(11, dtype=np.uint8) * 20, 32 * 48 * 3).reshape(11, 32, 48, 3)
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for slot, image in zip(slots, greys, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = slot, fractions.Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    read = video.read_video(tmp_path / "a.avi")
    np.testing.assert_allclose(read.times, np.array(slots) / 25)
    assert clips.probe(record(tmp_path / "a.avi")).num_frames == len(slots)
    with clips._reader(record(tmp_path / "a.avi")) as reader:
        (image,) = reader.frames_at(np.array([1.5]), np.asarray)  # between slots 21 and 60
    np.testing.assert_array_equal(image, read.frames[9])
    whole = (tmp_path / "a.avi").read_bytes()
    (tmp_path / "a.avi").write_bytes(whole[: (whole.index(b"movi") + whole.index(b"idx1")) // 2])
    with pytest.raises(BrokenRecord, match="cut short"):
        clips.probe(record(tmp_path / "a.avi"))


def test_a_change_of_size_is_brought_to_one(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams, index = [container.add_stream("mjpeg", rate=25)], 0
        other = av.CodecContext.create("mjpeg", "w")
        other.time_base = fractions.Fraction(1, 25)
        for coder, size in ((streams[0], (24, 40)), (other, (48, 32))):
            coder.height, coder.width, coder.pix_fmt = *size, "yuvj420p"
            for _ in range(4):
                frame = av.VideoFrame.from_ndarray(quarters(*size), format="rgb24")
                frame.pts, frame.time_base = index, fractions.Fraction(1, 25)
                for packet in coder.encode(frame):
                    packet.stream = streams[0]
                    container.mux(packet)
                index += 1
    assert video.read_video(tmp_path / "a.mkv").frames.shape == (8, 24, 40, 3)
    sheet = clips.read_overview(record(tmp_path / "a.mkv"), 8, 24)
    assert sheet.shape == (8, 24, 40, 3)
    assert [corners(image) for image in sheet] == [corners(quarters())] * 8


@pytest.mark.parametrize("suffix", [".m2ts", ".vob", ".mxf", ".y4m"])
def test_more_containers_are_known(tmp_path, suffix):
    codec = "wrapped_avframe" if suffix == ".y4m" else "mpeg2video"
    frames = [av.VideoFrame.from_ndarray(quarters(), format="rgb24") for _ in range(5)]
    encode(tmp_path / f"a{suffix}", frames, codec, "yuv420p")
    assert suffix in VIDEO_SUFFIXES
    assert corners(both(tmp_path / f"a{suffix}")[0]) == corners(quarters())


def test_avif_is_a_picture(tmp_path):
    Image.fromarray(quarters()).save(tmp_path / "a.avif")
    assert record(tmp_path / "a.avif").is_image
    (image,) = clips.read_overview(record(tmp_path / "a.avif"), 1, 24)
    assert corners(image) == corners(quarters())
