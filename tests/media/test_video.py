"""Video files: what is written reads back, time rules over frame numbers, and bad files say so."""

import fractions
import itertools
import os
import struct
import tracemalloc

import av
import numpy as np
import pytest
from media_files import greys, number_of, write
from PIL import Image

from dicode_jax.data import shapes_world as synthetic
from dicode_jax.errors import UserError
from dicode_jax.media import video
from dicode_jax.media.writer import VIDEO_SUFFIXES
from dicode_jax.storage import files


def moving(num_frames=16, height=48, width=64, seed=0):
    """Smooth frames, all different, that survive lossy coding: [f, h, w, 3]."""
    rng = np.random.default_rng(seed)
    y, x, t = np.ogrid[:height, :width, :num_frames]
    planes = [
        np.sin(x / rng.uniform(6, 12) + t / 4) + np.cos(y / rng.uniform(6, 12)) for _ in "rgb"
    ]
    frames = np.stack(planes, -1).transpose(2, 0, 1, 3)
    return np.round(127.5 + 60 * frames).clip(0, 255).astype(np.uint8)


def encode(path, frames, codec, pix_fmt="yuv420p", times=None, **options):
    """Writes any container that PyAV knows; `times` in hundredths of a second."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=100 if times is not None else 8)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[index]), fractions.Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_sound(path, codec="aac"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=44100)
        for index in range(20):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 44100, 1024 * index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(("suffix", "error"), [(".mp4", 4.0), (".gif", 9.0), (".webp", 0.0)])
def test_what_is_written_reads_back(tmp_path, suffix, error):
    frames, path = moving(), tmp_path / f"out{suffix}"
    video.write_video(path, frames, fps=8)
    read = video.read_video(path)
    assert read.frames.shape == frames.shape
    assert np.abs(read.frames.astype(int) - frames).mean() <= error
    np.testing.assert_allclose(
        read.times, np.arange(16) / 8, atol=0.0051
    )  # a gif counts hundredths
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_equal_frames_are_not_merged(tmp_path, suffix):
    frames = np.repeat(moving(1), 16, axis=0)
    video.write_video(tmp_path / f"still{suffix}", frames)
    assert video.read_video(tmp_path / f"still{suffix}").frames.shape == frames.shape


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_odd_sizes_can_be_written(tmp_path, suffix):
    frames = moving(4, 31, 45)
    video.write_video(tmp_path / f"odd{suffix}", frames)
    height, width = video.read_video(tmp_path / f"odd{suffix}").frames.shape[1:3]
    assert (height, width) == ((32, 46) if suffix == ".mp4" else (31, 45))


def test_a_generator_is_enough_to_write(tmp_path):
    video.write_video(tmp_path / "out.mp4", (frame for frame in moving(5)))
    assert len(video.read_video(tmp_path / "out.mp4").frames) == 5


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("b.mkv", "libx264", "yuv444p"),
        ("c.avi", "mpeg4", "yuv420p"),
        ("d.mov", "mjpeg", "yuvj420p"),
        ("e.ts", "mpeg2video", "yuv420p"),
    ],
)
def test_other_containers_and_codecs_are_read(tmp_path, name, codec, pix_fmt):
    frames = moving(25, 50, 66)
    rate = {"times": 4 * np.arange(25)} if codec == "mpeg2video" else {}
    encode(tmp_path / name, frames, codec, pix_fmt, **rate)
    read = video.read_video(tmp_path / name)
    assert read.frames.shape == frames.shape
    assert np.abs(read.frames.astype(int) - frames).mean() < 12
    info = video.probe(tmp_path / name)
    assert (info.height, info.width) == (50, 66)


@pytest.mark.parametrize("name", ["a.mkv", "b.mp4", "c.avi"])
def test_a_title_in_another_encoding_does_no_harm(tmp_path, name):
    path, title = tmp_path / name, b"a title of its own"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title.decode()
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for image in moving(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    assert data.count(title) == 1
    path.write_bytes(data.replace(title, "Été à Lyon en 1998".encode("latin-1")))
    assert len(video.read_video(path).frames) == 5
    assert video.probe(path).width == 64


@pytest.mark.parametrize(
    "name", ["in:1.mp4", "file:a.mp4", "-b.mp4", "50%d.mp4", "語" * 82 + ".mp4"]
)
def test_a_path_is_no_address(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    video.write_video(name, moving(4))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(video.read_video(name).frames) == 4


def test_keyframes_follow_time_and_not_frame_number(tmp_path):
    times = [0, 10, 30, 150, 199, 201, 260, 390, 402, 480, 575]  # hundredths of a second
    frames = moving(len(times), seed=3)
    encode(tmp_path / "vfr.mkv", frames, "ffv1", "bgr0", times=times)
    read = video.read_video(tmp_path / "vfr.mkv")
    np.testing.assert_allclose(read.times, np.array(times) / 100)
    keyframes = list(video.iter_keyframes(tmp_path / "vfr.mkv"))
    expected = [0, 4, 7, 10]  # on screen at 0, 2 and 4 s; and the last, 1.75 s on
    for keyframe, index in zip(keyframes, expected, strict=True):
        np.testing.assert_array_equal(keyframe.image, frames[index])
    demo = list(video.iter_keyframes(tmp_path / "vfr.mkv", "demo"))
    np.testing.assert_array_equal([f.image for f in demo], frames[[0, -1]])


@pytest.mark.parametrize(("num_frames", "clips"), [(2, 1), (16, 1), (23, 1), (25, 2), (80, 5)])
def test_the_number_of_keyframes_fits_the_length(tmp_path, num_frames, clips):
    video.write_video(tmp_path / "a.webp", moving(num_frames, 16, 16))
    assert len(list(video.iter_keyframes(tmp_path / "a.webp"))) == clips + 1


def test_keyframes_of_a_synthetic_video_are_its_own(tmp_path):
    scene = synthetic.scene_at(0, 4)
    clips = synthetic.render(scene, 3)
    video.write_video(tmp_path / "a.webp", clips.reshape(-1, 64, 64, 3))
    keyframes = np.stack([frame.image for frame in video.iter_keyframes(tmp_path / "a.webp")])
    np.testing.assert_array_equal(keyframes, synthetic.render_keyframes(scene, 4))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_is_applied(tmp_path, turns):
    """Phones store frames lying on their side, with a matrix in the track header."""
    frames = moving(3, 48, 64)
    video.write_video(tmp_path / "flat.mp4", frames)
    data = bytearray((tmp_path / "flat.mp4").read_bytes())
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b = [(0, 1), (-1, 0), (0, -1)][turns - 1]  # clockwise quarter turns
    matrix = struct.pack(">9i", a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30)
    place = data.index(identity, data.index(b"tkhd"))
    data[place : place + len(matrix)] = matrix
    (tmp_path / "turned.mp4").write_bytes(data)
    read = video.read_video(tmp_path / "turned.mp4").frames
    flat = video.read_video(tmp_path / "flat.mp4").frames
    np.testing.assert_array_equal(read, np.rot90(flat, -turns, axes=(1, 2)))


def test_a_size_that_changes_midway_is_brought_back(tmp_path):
    first, second = moving(3, 48, 64), moving(3, 96, 128)
    encode(tmp_path / "a.ts", first, "mpeg2video", times=4 * np.arange(3))
    encode(tmp_path / "b.ts", second, "mpeg2video", times=12 + 4 * np.arange(3))
    both = (tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes()
    (tmp_path / "both.ts").write_bytes(both)
    read = video.read_video(tmp_path / "both.ts")
    assert read.frames.shape[1:] == (48, 64, 3)
    assert len(read.frames) > 3
    assert (np.diff(read.times) >= 0).all()


def test_a_gif_made_elsewhere_keeps_its_times(tmp_path):
    images = [Image.fromarray(frame) for frame in moving(4)]
    images[0].save(tmp_path / "p.gif", save_all=True, append_images=images[1:], duration=700)
    read = video.read_video(tmp_path / "p.gif")
    np.testing.assert_allclose(read.times, [0, 0.7, 1.4, 2.1])
    assert len(list(video.iter_keyframes(tmp_path / "p.gif"))) == 2


class TestBadInput:
    """Every bad file is one line of `UserError`."""

    def refuse(self, path, message):
        with pytest.raises(UserError, match=message) as error:
            list(video.iter_keyframes(path))
        assert "\n" not in str(error.value)

    def test_missing_empty_and_folder(self, tmp_path):
        self.refuse(tmp_path / "no.mp4", "there is no file")
        (tmp_path / "empty.mp4").touch()
        self.refuse(tmp_path / "empty.mp4", "is empty")
        self.refuse(tmp_path, "is a folder")

    @pytest.mark.parametrize("name", ["a.mp4", "a.txt", "a.webp", "a.gif"])
    def test_text_and_noise(self, tmp_path, name):
        (tmp_path / name).write_text("not a video\n" * 400)
        self.refuse(tmp_path / name, "cannot be read as a video|is not a video")
        (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(5000))
        self.refuse(tmp_path / name, "cannot be read as a video|is not a video")

    def test_sound_alone(self, tmp_path):
        write_sound(tmp_path / "sound.mp4")
        self.refuse(tmp_path / "sound.mp4", "holds sound but no picture")

    def test_one_frame(self, tmp_path):
        video.write_video(tmp_path / "one.mp4", moving(1))
        self.refuse(tmp_path / "one.mp4", "holds one frame only")
        Image.fromarray(moving(1)[0]).save(tmp_path / "one.png")
        self.refuse(tmp_path / "one.png", "is not a video, or is damaged: it holds none of asf, ")
        Image.fromarray(moving(1)[0]).save(tmp_path / "one.webp")
        self.refuse(tmp_path / "one.webp", "holds one frame only")

    @pytest.mark.parametrize("kept", [0.04, 0.5, 0.9])
    @pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "b.webm", "b.avi", "b.mkv"])
    def test_cut_short(self, tmp_path, name, kept):
        codec = {"b.webm": "libvpx-vp9", "b.avi": "mpeg4", "b.mkv": "libx264"}.get(name)
        frames = moving(40, seed=1)
        if codec:
            encode(tmp_path / name, frames, codec)
        else:
            video.write_video(tmp_path / name, frames)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: int(kept * len(data))])
        self.refuse(tmp_path / name, "cut short|cannot be read|holds no frame|is damaged")

    def test_unknown_keyframes(self, tmp_path):
        with pytest.raises(UserError, match="unknown keyframes 'some'"):
            next(video.iter_keyframes(tmp_path / "a.mp4", "some"))
        with pytest.raises(UserError, match="interval must be a positive number"):
            next(video.iter_keyframes(tmp_path / "a.mp4", interval=float("nan")))


class TestOutput:
    """Bad outputs are refused before the work, and nothing half-written stays."""

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("out.mpg", "has the extension '.mpg'; write to one of: .mp4, .gif, .webp"),
            ("out", "has no extension"),
            ("no/out.mp4", "does not exist"),
            ("folder.mp4", "is a folder"),
        ],
    )
    def test_bad_paths(self, tmp_path, name, message):
        (tmp_path / "folder.mp4").mkdir()
        with pytest.raises(UserError, match=message):
            video.write_video(tmp_path / name, moving(2))
        assert os.listdir(tmp_path) == ["folder.mp4"]

    def test_a_folder_that_cannot_be_written(self):
        with pytest.raises(UserError, match="cannot write into the folder /proc"):
            files.check_output("/proc/out.mp4", (".mp4",))

    @pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_an_interruption_leaves_the_old_file(self, tmp_path, suffix, error):
        path = tmp_path / f"out{suffix}"
        path.write_text("old")

        def broken():
            yield from moving(3)
            raise error

        with pytest.raises(error):
            video.write_video(path, broken())
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == [path.name]

    def test_upper_case_extensions_are_known(self, tmp_path):
        video.write_video(tmp_path / "OUT.MP4", moving(2))
        assert len(video.read_video(tmp_path / "OUT.MP4").frames) == 2

    @pytest.mark.parametrize(
        "fps", [0, -1, float("nan"), float("inf"), 1e9, 1e-9, 10**400, "8", True]
    )
    def test_absurd_rates_are_refused(self, tmp_path, fps):
        with pytest.raises(UserError, match="fps must lie between"):
            video.write_video(tmp_path / "a.mp4", moving(2), fps=fps)

    def test_what_is_no_frame_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no frames"):
            video.write_video(tmp_path / "a.mp4", [])
        with pytest.raises(ValueError, match=r"want frames uint8 \[h, w, 3\], got float64"):
            video.write_video(tmp_path / "a.mp4", np.zeros((2, 8, 8, 3)))
        frames = itertools.chain(moving(1, 16, 16), moving(1, 16, 18))
        with pytest.raises(ValueError, match="differ in size"):
            video.write_video(tmp_path / "a.mp4", frames)
        assert not os.listdir(tmp_path)


class TestContactSheet:
    def test_rows_show_evenly_spaced_frames(self, tmp_path):
        row = np.stack([np.full((8, 8, 3), 10 * i, np.uint8) for i in range(20)])
        path = tmp_path / "new" / "sheet.png"
        video.contact_sheet(path, [row, row[:2]], columns=3, cell_size=16)
        sheet = np.asarray(Image.open(path))
        assert sheet.shape == (2 * 8 + 2 * 16 + 8, 2 * 8 + 3 * 16 + 2 * 2, 3)
        values = [int(sheet[16, 8 + 18 * i + 8, 0]) for i in range(3)]
        assert values == [0, 100, 190]  # first, middle and last; even counts round to 10
        second = sheet[8 + 16 + 8 + 8]
        assert (second[16, 0], second[34, 0], second[52, 0]) == (0, 10, 250)

    def test_labels_take_room_and_are_cut_to_fit(self, tmp_path):
        rows = [moving(4, 16, 16)]
        video.contact_sheet(tmp_path / "a.png", rows, labels=["word " * 200], cell_size=32)
        video.contact_sheet(tmp_path / "b.png", rows, cell_size=32)
        a, b = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
        assert a.width == b.width
        assert a.height > b.height

    @pytest.mark.parametrize(
        ("h", "w", "cell"), [(1, 20000, (1, 128)), (2, 100, (3, 128)), (20000, 1, (16, 1))]
    )
    def test_a_very_wide_frame_takes_no_more_than_a_wide_cell(self, tmp_path, h, w, cell):
        """A GIF of 200 bytes can be 65535 wide."""
        tracemalloc.start()
        try:
            video.contact_sheet(
                tmp_path / "a.png", [np.zeros((1, h, w, 3), np.uint8)], cell_size=16
            )
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 1e6
        sheet = Image.open(tmp_path / "a.png")
        assert (sheet.height - 16, sheet.width - 16) == cell

    def test_wrong_rows_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="want rows"):
            video.contact_sheet(tmp_path / "a.png", [])
        with pytest.raises(ValueError, match="2 labels for 1 rows"):
            video.contact_sheet(tmp_path / "a.png", [moving(2)], labels=["a", "b"])


def test_frames_at_a_rate_are_what_is_on_screen(tmp_path):
    frames = np.repeat(np.arange(6, dtype=np.uint8), 8 * 8 * 3).reshape(6, 8, 8, 3) * 40
    video.write_video(tmp_path / "a.webp", frames, fps=10)
    shown = {
        fps: [int(x.image[0, 0, 0]) // 40 for x in video.iter_frames_at(tmp_path / "a.webp", fps)]
        for fps in (5, 10, 20)
    }
    assert shown == {
        5: [0, 2, 4],
        10: [0, 1, 2, 3, 4, 5],
        20: [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5],
    }


@pytest.mark.parametrize(("name", "rate"), [("a.mkv", 24), ("a.mkv", 30), ("a.gif", 8)])
def test_rounded_time_stamps_double_no_frame_and_lose_none(tmp_path, name, rate):
    frames = greys(20)
    if name == "a.gif":
        video.write_video(tmp_path / name, frames, fps=rate)
    else:
        write(tmp_path / name, frames, rate=rate)
    found = [frame.image for frame in video.iter_frames_at(tmp_path / name, rate)]
    assert number_of(found).tolist() == [*range(20)]
