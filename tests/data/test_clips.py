"""Clips, frames and keyframes: which frames are taken, how they are cut, and what is refused."""

import contextlib
import dataclasses
import fractions
import io
import pathlib
import struct

import av
import numpy as np
import pytest
from media_files import STEP, gif_bytes, greys, mp4_bytes, number_of, write
from PIL import Image

from dicode_jax.data import clips
from dicode_jax.data import shapes_world as synthetic
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import BrokenRecord, MediaBytes, MediaFile, Record, suffix_of
from dicode_jax.data.sources.shapes import FRAME_LABELS
from dicode_jax.errors import UserError
from dicode_jax.media import video

SIZE = 16
PLAIN = DataConfig(num_frames=4, clip_start="start")


def record(path, **media):
    media = MediaFile(path=str(path), suffix=suffix_of(str(path)), **media)
    return Record(name=pathlib.Path(path).name, captions=(), media=media)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """40 frames, 25 a second: 1.6 s."""
    path = tmp_path_factory.mktemp("steady") / "steady.mp4"
    write(path, greys(40), rate=25)
    return record(path)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """42 frames, 4 a second, 10.5 s, in groups of 8 that refer to each other both ways."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    write(path, greys(42), rate=4, g="8", bf="2")
    return record(path)


def test_frames_are_taken_by_time(steady):
    cfg = dataclasses.replace(PLAIN, num_frames=10, fps=8.0)
    clip = clips.read_clip(steady, cfg, SIZE, rng())
    wanted = [int(25 * i / 8) for i in range(10)]  # what is on screen at i / 8 s
    assert number_of(clip["video"]).tolist() == wanted
    assert clip["video"].shape == (10, SIZE, SIZE, 3)
    assert clip["video"].dtype == np.uint8
    assert (clip["fps"], clip["frame_stride"]) == (8.0, 3)


def test_a_variable_rate_is_read_by_time_stamps(tmp_path):
    write(tmp_path / "vfr.mp4", greys(6), times=[0, 10, 20, 130, 140, 260])
    cfg = dataclasses.replace(PLAIN, num_frames=6, fps=2.0)
    clip = clips.read_clip(record(tmp_path / "vfr.mp4"), cfg, SIZE, rng())
    assert number_of(clip["video"]).tolist() == [0, 2, 2, 4, 4, 4]  # at 0, 0.5, 1, 1.5, 2, 2.5 s


@pytest.mark.parametrize("suffix", [".gif", ".webm", ".avi"])
def test_other_containers_give_the_same_frames(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    if suffix == ".gif":
        video.write_video(path, greys(17), fps=8)
    else:
        options = {".webm": {"codec": "libvpx"}, ".avi": {"codec": "mpeg4", "qmax": "2", "bf": "2"}}
        write(path, greys(17), **options[suffix])
    cfg = dataclasses.replace(PLAIN, num_frames=16, fps=8.0)
    assert number_of(clips.read_clip(record(path), cfg, SIZE, rng())["video"]).tolist() == [
        *range(16)
    ]


def test_a_stride_takes_every_nth_frame(steady):
    cfg = dataclasses.replace(PLAIN, fps=None, frame_stride=12, clip_start="random")
    starts = set()
    for seed in range(40):
        clip = clips.read_clip(steady, cfg, SIZE, rng(seed))
        numbers = number_of(clip["video"])
        assert np.diff(numbers).tolist() == [12, 12, 12]
        starts.add(int(numbers[0]))
    assert starts == {0, 1, 2, 3}  # the last of 40 frames is 3 + 36
    assert float(clip["fps"]) == pytest.approx(25 / 12)
    assert clip["frame_stride"] == 12


def test_a_whole_video_is_all_of_its_frames_at_a_rate_or_a_stride(steady, monkeypatch):
    strided = dataclasses.replace(PLAIN, fps=None, frame_stride=3)
    read = clips.read_whole(steady, strided, SIZE, rng())
    assert number_of(read["frames"]).tolist() == list(range(0, 40, 3))
    np.testing.assert_allclose(read["times"], np.arange(0, 40, 3) / 25, atol=1e-6)
    read = clips.read_whole(steady, dataclasses.replace(PLAIN, fps=5.0), SIZE, rng())
    assert number_of(read["frames"]).tolist() == [0, 5, 10, 15, 20, 25, 30, 35]
    monkeypatch.setattr(clips, "_MOST_PIXELS", 40 * 3 * SIZE**2 - 1)
    with pytest.raises(BrokenRecord, match=r"its 40 frames need .* GiB at once; cut it"):
        clips.read_whole(steady, dataclasses.replace(strided, frame_stride=1), SIZE, rng())


def test_a_random_start_is_seeded_and_reaches_every_frame(tmp_path):
    write(tmp_path / "a.mp4", greys(11))
    cfg = dataclasses.replace(PLAIN, num_frames=8, clip_start="random")
    starts = []
    for seed in range(60):
        numbers = number_of(
            clips.read_clip(record(tmp_path / "a.mp4"), cfg, SIZE, rng(seed))["video"]
        )
        assert np.diff(numbers).tolist() == [1] * 7
        starts.append(int(numbers[0]))
    # Four starts, each with probability 1/4: 15 of 60 each.
    assert np.bincount(starts, minlength=4).min() >= 6
    assert set(starts) == {0, 1, 2, 3}
    again = clips.read_clip(record(tmp_path / "a.mp4"), cfg, SIZE, rng(59))
    assert number_of(again["video"])[0] == starts[-1]


def test_the_middle_of_a_long_video_is_found_by_seeking(long):
    cfg = dataclasses.replace(PLAIN, num_frames=5, fps=4.0, clip_start="center")
    clip = clips.read_clip(long, cfg, SIZE, rng())
    start = (41 / 4 - 4 / 4) / 2  # 4.625 s
    assert number_of(clip["video"]).tolist() == [int(4 * start) + i for i in range(5)]


def test_every_place_of_a_long_video_can_be_sought(long):
    cfg = dataclasses.replace(PLAIN, num_frames=3, fps=4.0, clip_start="random")
    firsts = set()
    for seed in range(30):
        generator = rng(seed)
        start = rng(seed).uniform(0, 10.5 - 0.5)
        numbers = number_of(clips.read_clip(long, cfg, SIZE, generator)["video"])
        assert numbers.tolist() == [int(4 * start + 0.02) + i for i in range(3)]
        firsts.add(int(numbers[0]))
    assert len(firsts) > 15


def test_a_short_video_repeats_its_last_frame(tmp_path):
    write(tmp_path / "short.mp4", greys(3))
    cfg = dataclasses.replace(PLAIN, num_frames=5)
    for start in ("start", "center", "random"):
        short = dataclasses.replace(cfg, clip_start=start)
        clip = clips.read_clip(record(tmp_path / "short.mp4"), short, SIZE, rng())
        assert number_of(clip["video"]).tolist() == [0, 1, 2, 2, 2]
    by_stride = dataclasses.replace(cfg, fps=None, frame_stride=1)
    clip = clips.read_clip(record(tmp_path / "short.mp4"), by_stride, SIZE, rng())
    assert number_of(clip["video"]).tolist() == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("rate", [{"fps": 8.0}, {"fps": None, "frame_stride": 1}])
def test_a_video_below_the_least_share_of_a_clip_is_refused(tmp_path, rate):
    write(tmp_path / "short.mp4", greys(3))
    cfg = dataclasses.replace(PLAIN, num_frames=5, min_clip=0.61, **rate)
    with pytest.raises(BrokenRecord, match=r"^short.mp4: is too short, it shows 3 of the 5 frames"):
        clips.read_clip(record(tmp_path / "short.mp4"), cfg, SIZE, rng())
    allowed = dataclasses.replace(cfg, min_clip=0.6)
    assert len(clips.read_clip(record(tmp_path / "short.mp4"), allowed, SIZE, rng())["video"]) == 5


def test_bytes_and_parts_of_a_file_read_as_the_file_does(tmp_path, steady):
    data = pathlib.Path(steady.media.path).read_bytes()
    packed = tmp_path / "packed"
    packed.write_bytes(b"front" + data + b"behind")
    part = MediaFile(path=str(packed), suffix=".mp4", offset=5, size=len(data))
    media = (part, MediaBytes(data=data, suffix=".mp4"))
    cfg = dataclasses.replace(PLAIN, num_frames=8, clip_start="random", crop="random")
    wanted = clips.read_clip(steady, cfg, SIZE, rng(3))["video"]
    for one in media:
        got = clips.read_clip(dataclasses.replace(steady, media=one), cfg, SIZE, rng(3))["video"]
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("length", "rate", "wanted"),
    [
        (1, 8, [0.0]),
        (4, 8, [0.0, 0.375]),  # the last frame, so that there is a clip
        (23, 8, [0.0, 2.0]),  # 2.875 s: less than a second would be left
        (25, 8, [0.0, 2.0, 3.0]),  # 3.125 s: more than a second is left
        (41, 8, [0.0, 2.0, 4.0, 5.0]),
    ],
)
def test_keyframes_of_a_short_video_lie_on_a_grid(tmp_path, length, rate, wanted):
    write(tmp_path / "a.mp4", greys(length), rate=rate)
    cfg = dataclasses.replace(PLAIN, clip_start="random")
    got = clips.read_keyframes(record(tmp_path / "a.mp4"), cfg, SIZE, rng(), 6)
    k = len(wanted)
    assert got["frame_mask"].tolist() == [True] * k + [False] * (6 - k)
    np.testing.assert_allclose(got["times"], wanted + [0.0] * (6 - k), atol=1e-6)
    assert number_of(got["keyframes"][:k]).tolist() == [round(8 * time) for time in wanted]
    assert not got["keyframes"][k:].any()


@pytest.mark.parametrize(
    ("rate", "lengths"), [(8, (10, 17, 23, 25, 33)), (fractions.Fraction(24000, 1001), (40, 60))]
)
def test_keyframes_agree_with_those_that_are_encoded_elsewhere(tmp_path, rate, lengths):
    for length in lengths:
        path = tmp_path / f"{length}.mp4"
        write(path, greys(length), rate=rate)
        got = clips.read_keyframes(record(path), PLAIN, SIZE, rng(), 8)
        wanted = list(video.iter_keyframes(path))
        assert number_of(got["keyframes"][got["frame_mask"]]).tolist() == [
            int(number_of(frame.image)) for frame in wanted
        ]


def test_keyframes_of_a_long_video_start_anywhere(long):
    cfg = dataclasses.replace(PLAIN, clip_start="random")
    starts = []
    for seed in range(40):
        got = clips.read_keyframes(long, cfg, SIZE, rng(seed), 3)
        assert got["frame_mask"].all()
        np.testing.assert_allclose(np.diff(got["times"]), 2.0, atol=1e-5)
        assert number_of(got["keyframes"]).tolist() == [
            int(4 * time + 0.02) for time in got["times"]
        ]
        starts.append(float(got["times"][0]))
    assert min(starts) < 1.5
    assert 5.0 < max(starts) < 6.5


def test_a_picture_is_one_keyframe_and_no_clip(tmp_path):
    Image.fromarray(greys(5)[4]).save(tmp_path / "still.png")
    still = record(tmp_path / "still.png")
    got = clips.read_keyframes(still, PLAIN, SIZE, rng(), 3)
    assert got["frame_mask"].tolist() == [True, False, False]
    assert number_of(got["keyframes"]).tolist() == [4, 0, 0]
    assert number_of(clips.read_frame(still, PLAIN, SIZE, rng())["image"]) == 4
    with pytest.raises(BrokenRecord, match=r"^still.png: is a picture, which gives no clip"):
        clips.read_clip(still, PLAIN, SIZE, rng())


def sides(height, width):
    """Red on the left, green on the right, blue in the lower half."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2, 0] = image[:, width // 2 :, 1] = image[height // 2 :, :, 2] = 255
    return image


def test_stretch_shows_everything_and_crop_the_middle(tmp_path):
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, :20] = image[:, 60:] = 255  # white at both ends
    Image.fromarray(image).save(tmp_path / "a.png")
    read = lambda **cfg: clips.read_frame(  # noqa: E731
        record(tmp_path / "a.png"), dataclasses.replace(PLAIN, **cfg), SIZE, rng()
    )["image"]
    stretched = read(resize="stretch")[8, :, 0]
    assert (stretched[[0, 1, 2, -3, -2, -1]] > 250).all()
    assert (stretched[5:11] < 5).all()
    assert read(resize="crop")[:, 2:-2].max() < 5


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_a_frame_is_resized_by_triangles_as_wide_as_told(tmp_path, resize, antialias):
    """Sums of the pixels around the centre of each new one, weighted by their distance."""
    image = rng().integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    cfg = dataclasses.replace(PLAIN, resize=resize, antialias=antialias)
    got = clips.read_frame(record(tmp_path / "a.png"), cfg, SIZE, rng())["image"]

    def weights(count, start, length):
        factor = length / SIZE
        centre = start + factor * (np.arange(SIZE) + 0.5)
        away = np.abs(np.arange(count) + 0.5 - centre[:, None])
        taps = np.maximum(1 - away / (factor if antialias else 1), 0)
        return taps / taps.sum(axis=1, keepdims=True)

    columns = weights(64, 8, 48) if resize == "crop" else weights(64, 0, 64)
    want = np.einsum("yh,xw,hwc->yxc", weights(48, 0, 48), columns, image)
    np.testing.assert_allclose(got, want, atol=1.01)  # Pillow rounds after each axis


def test_an_overview_is_antialiased(tmp_path):
    board = np.indices((224, 112)).sum(axis=0) % 2 * 255  # each pixel black or white
    Image.fromarray(np.stack([board] * 3, -1).astype(np.uint8)).save(tmp_path / "a.png")
    shown = clips.read_overview(record(tmp_path / "a.png"), 1, height=112)
    assert shown.shape == (1, 112, 56, 3)
    np.testing.assert_allclose(shown[:, 1:-1, 1:-1], 127.5, atol=1)  # rounded after each axis


@pytest.mark.parametrize(
    ("w", "h", "cell"), [(20000, 1, (1, 896)), (1, 20000, (112, 1)), (64, 32, (112, 224))]
)
def test_an_overview_is_as_small_as_a_cell(tmp_path, w, h, cell):
    (tmp_path / "a.gif").write_bytes(gif_bytes(w, h, 3))
    Image.new("RGB", (w, h)).save(tmp_path / "a.png")
    assert clips.read_overview(record(tmp_path / "a.gif"), 8).shape == (3, *cell, 3)
    assert clips.read_overview(record(tmp_path / "a.png"), 8).shape == (1, *cell, 3)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("shape", [(40, 80), (60, 40)])
def test_frames_that_are_no_squares_show_the_middle_of_their_shape(tmp_path, shape, antialias):
    height, width = shape
    ramps = np.zeros((height, width, 3), np.uint8)
    ramps[..., 0] = np.arange(width)  # a level a pixel, across
    ramps[..., 1] = np.arange(height)[:, None]
    Image.fromarray(ramps).save(tmp_path / "a.png")
    cfg = dataclasses.replace(PLAIN, resize="crop", antialias=antialias)
    image = clips.read_frame(record(tmp_path / "a.png"), cfg, (16, 24), rng())["image"]
    assert image.shape == (16, 24, 3)
    scale = min(height / 16, width / 24)
    across = (width - 24 * scale) / 2 + scale * (np.arange(24) + 0.5) - 0.5
    down = (height - 16 * scale) / 2 + scale * (np.arange(16) + 0.5) - 0.5
    np.testing.assert_allclose(image[8, 2:-2, 0], across[2:-2], atol=1)
    np.testing.assert_allclose(image[2:-2, 8, 1], down[2:-2], atol=1)


def test_the_drawn_world_has_square_frames_alone():
    scene = Record(name="scene", media=synthetic.scene_at(0, 0), captions=())
    with pytest.raises(UserError, match="is a square, its frames cannot be 16 x 24"):
        clips.read_clip(scene, PLAIN, (16, 24), rng())


def test_a_random_crop_is_seeded_and_the_same_in_all_frames(tmp_path):
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None] * 2, (32, 96, 3))
    write(tmp_path / "a.mp4", np.stack([ramp] * 6), crf="4")
    cfg = dataclasses.replace(PLAIN, crop="random")
    lefts = []
    for seed in range(12):
        got = clips.read_clip(record(tmp_path / "a.mp4"), cfg, SIZE, rng(seed))["video"]
        left = got[:, :, 0].mean(axis=(1, 2))
        assert np.ptp(left) < 4
        lefts.append(left[0])
    assert min(lefts) < 30
    assert max(lefts) > 90


def test_a_picture_is_turned_as_its_tag_says(tmp_path):
    image = Image.fromarray(sides(32, 32))
    tags = Image.Exif()
    tags[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=tags)
    got = clips.read_frame(record(tmp_path / "turned.png"), PLAIN, SIZE, rng())["image"]
    np.testing.assert_array_less(np.abs(got[2, 2].astype(int) - [255, 0, 255]), 10)  # lower left
    np.testing.assert_array_less(np.abs(got[2, 13].astype(int) - [255, 0, 0]), 10)  # upper left


def test_a_video_is_turned_as_its_header_says(tmp_path):
    images = np.stack([sides(48, 64)] * 4)
    write(tmp_path / "flat.mp4", images)
    data = bytearray((tmp_path / "flat.mp4").read_bytes())
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # clockwise
    place = data.index(identity, data.index(b"tkhd"))
    data[place : place + len(quarter)] = quarter
    turned = Record(name="t", captions=(), media=MediaBytes(data=bytes(data), suffix=".mp4"))
    info = clips.probe(turned)
    assert (info.width, info.height) == (48, 64)
    got = clips.read_frame(turned, PLAIN, SIZE, rng())["image"].astype(int)
    assert np.abs(got[3, 3] - [255, 0, 255]).max() < 40  # what was the lower left
    assert np.abs(got[3, 12] - [255, 0, 0]).max() < 40  # what was the upper left


def test_a_frame_is_taken_anywhere(steady):
    cfg = dataclasses.replace(PLAIN, clip_start="random")
    numbers = {
        int(number_of(clips.read_frame(steady, cfg, SIZE, rng(s))["image"])) for s in range(30)
    }
    assert min(numbers) < 5
    assert max(numbers) > 34
    assert number_of(clips.read_frame(steady, PLAIN, SIZE, rng())["image"]) == 0


def test_a_scene_gives_what_the_synthetic_world_draws():
    scene = synthetic.scene_at(5, 3, "test")
    drawn = Record(name="shapes/3", captions=(scene.caption,), media=scene)
    keyframes = clips.read_keyframes(drawn, DataConfig(), SIZE, rng(), 4)
    np.testing.assert_array_equal(
        keyframes["keyframes"], synthetic.render_keyframes(scene, 4, frame_size=SIZE)
    )
    assert keyframes["frame_mask"].all()
    cfg = DataConfig(clip_start="start")
    clip = clips.read_clip(drawn, cfg, SIZE, rng())["video"]
    np.testing.assert_array_equal(clip[[0, -1]], keyframes["keyframes"][:2])
    labels = clips.read_frame(drawn, DataConfig(), SIZE, rng())["labels"]
    said = [FRAME_LABELS[name][i] for name, i in zip(FRAME_LABELS, labels, strict=True)]
    assert said == [scene.attributes.color, scene.attributes.shape, scene.attributes.background]


def test_a_scene_longer_than_a_clip_goes_on_at_its_pace():
    scene = synthetic.scene_at(0, 3, "train")
    record = Record(name="scene", captions=("",), media=scene)
    longer = DataConfig(num_frames=31, resize="crop")
    read = clips.read_whole(record, longer, 32, rng(), clip_frames=16)
    first, second = synthetic.render(scene, 2, frame_size=32)
    np.testing.assert_array_equal(read["frames"][:16], first)
    np.testing.assert_array_equal(read["frames"][15:], second)
    np.testing.assert_allclose(read["times"], np.arange(31) * 2 / 15)
    alone = clips.read_whole(record, dataclasses.replace(longer, num_frames=16), 32, rng())
    np.testing.assert_array_equal(alone["frames"], first)


def test_any_of_a_scenes_clips_is_drawn():
    # A circle turns on, so that five clips in a row differ.
    words = synthetic.parse_caption("a red cross moves in a circle on a navy background")
    scene = synthetic.sample_scene(rng(), attributes=words)
    drawn = Record(name="circle", captions=(), media=scene)
    every = synthetic.render(scene, 5, frame_size=SIZE)
    seen = set()
    for seed in range(20):
        got = clips.read_clip(drawn, DataConfig(), SIZE, rng(seed))["video"].astype(int)
        errors = np.abs(every - got).max(axis=(1, 2, 3, 4))
        assert errors.min() <= 1
        seen.add(int(errors.argmin()))
    assert seen == set(range(5))


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for index in range(20):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 44100, 1024 * index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def odd_files(folder):
    """Writes files that cannot be read, of many kinds; their names."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), np.uint8)
    whole = mp4_bytes(noise)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video\n" * 50)
    (folder / "random.webm").write_bytes(np.random.default_rng(1).bytes(5000))
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    write(folder / "whole.webm", noise, codec="libvpx")
    webm = (folder / "whole.webm").read_bytes()
    (folder / "whole.webm").unlink()
    (folder / "cut.webm").write_bytes(webm[: len(webm) // 2])
    write_sound(folder / "sound.mp4")
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("not a picture")
    png = io.BytesIO()
    Image.fromarray(noise[0]).save(png, "PNG")
    (folder / "cut.png").write_bytes(png.getvalue()[:2000])
    return sorted(path.name for path in folder.iterdir())


def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path):
    names = odd_files(tmp_path)
    assert len(names) == 9
    for name in [*names, "gone.mp4"]:
        for read in (clips.read_frame, clips.read_clip, clips.probe):
            options = () if read is clips.probe else (PLAIN, SIZE, rng())
            with pytest.raises(BrokenRecord) as caught:
                read(record(tmp_path / name), *options)
            assert str(caught.value).startswith(name)
            assert "\n" not in str(caught.value)
    parts = record(tmp_path / "cut.mp4", offset=0, size=10**8)
    with pytest.raises(BrokenRecord, match="cut short"):
        clips.read_clip(parts, PLAIN, SIZE, rng())


def test_damage_in_the_middle_is_found_or_bridged_but_never_crashes(tmp_path):
    whole = bytearray(mp4_bytes(greys(40), rate=8, g="10"))
    generator = np.random.default_rng(0)
    cfg = dataclasses.replace(PLAIN, num_frames=16, clip_start="random")
    for trial in range(30):
        data = bytearray(whole)
        for at in generator.integers(100, len(data), 20):
            data[at] = generator.integers(256)
        media = MediaBytes(data=bytes(data), suffix=".mp4")
        damaged = Record(name="damaged", captions=(), media=media)
        with contextlib.suppress(BrokenRecord):
            got = clips.read_clip(damaged, cfg, SIZE, rng(trial))
            assert got["video"].shape == (16, SIZE, SIZE, 3)


@pytest.mark.parametrize(
    "error", [IndexError("x\x1b" * 999), ZeroDivisionError("z"), MemoryError(), OSError("o")]
)
def test_whatever_a_library_raises_breaks_the_record(steady, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(clips, "check_index", fail)
    for read in (clips.probe, lambda r: clips.read_clip(r, PLAIN, SIZE, rng())):
        with pytest.raises(BrokenRecord, match=r"^steady.mp4 cannot be read as a video") as caught:
            read(steady)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 300


def test_probe_counts_what_is_there(steady):
    info = clips.probe(steady)
    assert (info.width, info.height, info.num_frames) == (48, 32, 40)
    assert info.duration == pytest.approx(1.6)
    assert clips.frames_there(info, DataConfig(num_frames=16)) == 13  # 0, 0.125, ... 1.5 s
    stride = DataConfig(num_frames=16, fps=None, frame_stride=3)
    assert clips.frames_there(info, stride) == 14
    assert 40 * STEP < 256
