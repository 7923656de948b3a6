"""From a wish to news, with a pipeline that paints grey at once."""

import dataclasses
import threading
import time

import numpy as np
import pytest
from grey_pipeline import FPS, FRAMES, NAME, SIZE, GreyPipeline, grey_model
from media_files import greys, number_of, write
from PIL import Image

from dicode_jax.app import painter
from dicode_jax.app.limits import Limits
from dicode_jax.app.painter import Painter, Wish
from dicode_jax.errors import UserError
from dicode_jax.media.video import probe, read_video
from dicode_jax.media.videos import Video

WAIT = 20  # seconds, beyond which something hangs


class House:
    """A painter, its pipeline and a folder of uploads."""

    def __init__(self, root, **changes):
        self.pipe, self.loads = GreyPipeline(), []
        self.uploads = root / "uploads"
        self.uploads.mkdir(parents=True)
        limits = Limits(clips=3, prompt=40, frames=20, decoded=100, file_bytes=10**6)
        models = {NAME: grey_model(root, **changes)}
        self.painter = Painter(models, root, limits, load=self.load)
        self.session = self.painter.session()

    def load(self, folder):
        self.loads.append(folder)
        return self.pipe

    def run(self, session=None, **wish):
        known = {"model": NAME, "prompt": "grey", "num_clips": 2}
        return self.painter.run(session or self.session, Wish(**known | wish))


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path / "root")
    yield house
    house.painter.close()


def test_clips_come_one_by_one_and_then_the_whole_video(house):
    news = list(house.run(prompt="grey  on grey", seed=7, num_clips=3.0))
    parts = [read_video(one.video).frames for one in news if one.video and not one.made]
    assert len(parts[0]) == FRAMES
    made = news[-1].made
    whole = read_video(made.video)
    assert len(whole.frames) == 3 * FRAMES
    assert whole.fps == pytest.approx(FPS)
    np.testing.assert_allclose(whole.frames[::FRAMES].mean((1, 2, 3)), [10, 20, 30], atol=2)
    assert any("clip 2 of 3" in one.said for one in news)
    assert [one.done for one in news] == sorted(one.done for one in news)
    assert news[-1].said.startswith("1.5 s of video, painted in")
    assert house.session.history == [made]
    assert made.video.name == "grey-on-grey-7.mp4"
    told = probe(made.video).record
    assert (told["prompt"], told["seed"], told["num_clips"]) == ("grey  on grey", 7, 3)
    assert str(house.painter.root) not in str(told)


def test_the_video_has_a_picture_and_its_tokens(house):
    made = list(house.run())[-1].made
    assert Image.open(made.picture).size == (256, 256)
    tokens = np.asarray(Image.open(made.tokens)).astype(int)
    blue = (tokens[..., 2] - tokens[..., 0] > 100).any(axis=0)  # the first keyframe is below 0
    red = (tokens[..., 0] - tokens[..., 2] > 100).any(axis=0)
    assert np.flatnonzero(blue).mean() < np.flatnonzero(red).mean()


def test_keyframes_are_where_clips_begin_and_the_last_frame():
    video = Video(frames=greys(9, 4, 4), fps=8.0, tokens=np.zeros((3, 1, 1), np.float32))
    assert number_of(painter._keyframes(video, 4)).tolist() == [0, 4, 8]
    short = dataclasses.replace(video, frames=greys(8, 4, 4))  # without the one before the first
    assert number_of(painter._keyframes(short, 4)).tolist() == [0, 3, 7]


@pytest.mark.parametrize(
    ("wish", "line"),
    [
        ({"num_clips": 4}, "clips: want a whole number from 1 to 3, got 4"),
        ({"num_clips": "2"}, "clips: want a whole number"),
        ({"num_clips": 10**9}, "clips: want a whole number"),
        ({"prompt": "x" * 41}, "the prompt has 41 characters; at most 40"),
        ({"prompt": None}, "a prompt is text"),
        ({"seed": -1}, "seed: want a whole number from 0 to 4294967295"),
        ({"seed": 0.5}, "seed: want a whole number"),
        ({"quality": "superb"}, "quality: want draft or standard or best"),
        ({"quality": {"num_inference_steps": 1000}}, "quality: want draft"),
        ({"model": "/etc"}, "there is no such model here"),
        ({"model": ["grey"]}, "there is no such model here"),
        ({"start": "/etc/passwd"}, "no file that was uploaded here"),
        ({"last": "/etc/passwd"}, "no file that was uploaded here"),
        ({"start": "http://127.0.0.1/a.png"}, "no file that was uploaded here"),
    ],
)
def test_beyond_the_limits_nothing_is_loaded_or_painted(house, wish, line):
    with pytest.raises(UserError, match=line):
        list(house.run(**wish))
    assert house.loads == []
    assert not house.session.folder.exists()
    list(house.run())  # the visitor may go on


def test_a_preset_is_handed_on_and_the_standard_is_nothing(house):
    list(house.run(quality="draft"))
    list(house.run(quality="standard"))
    assert [one["quality"] for one in house.pipe.asked] == ["draft", None]
    assert [one["clips_per_batch"] for one in house.pipe.asked] == [1, 1]  # a stop after each


def test_a_mistake_that_the_pipeline_finds_is_told(house):
    with pytest.raises(UserError, match="the prompt is empty; say what to show"):
        list(house.run(prompt=" "))
    assert house.session.history == []
    assert list(house.session.folder.iterdir()) == []


def test_what_a_family_does_not_know_is_an_error_that_names_it(house):
    path = house.uploads / "last.png"
    Image.fromarray(greys(1)[0]).save(path)
    with pytest.raises(UserError, match="GreyPipeline does not know last_image"):
        list(house.run(start=path, last=path))


def test_what_is_no_mistake_is_logged_and_not_shown(house, caplog):
    def fail(index):
        raise RuntimeError("/home/me/secret")

    house.pipe.before = fail
    with pytest.raises(UserError, match="something went wrong here") as error:
        list(house.run())
    assert "secret" not in str(error.value)
    assert "secret" in caplog.text
    house.pipe.before = lambda index: None
    list(house.run())


def test_a_file_that_cannot_be_written_is_no_mistake_of_the_visitor(house, monkeypatch, caplog):
    def fail(self, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Video, "save", fail)
    with pytest.raises(UserError, match="something went wrong here"):
        list(house.run())
    assert "No space left" in caplog.text
    assert house.session.history == []


def test_too_little_memory_is_told(house):
    def fail(index):
        raise RuntimeError("RESOURCE_EXHAUSTED: 3 GB")

    house.pipe.before = fail
    with pytest.raises(UserError, match="not enough memory; ask for fewer clips"):
        list(house.run())


def test_a_picture_and_a_video_are_what_a_call_begins_with(house):
    picture, video = house.uploads / "first.png", house.uploads / "in.mp4"
    Image.fromarray(greys(2)[1]).save(picture)
    write(video, greys(20, SIZE + 2, SIZE), rate=2 * int(FPS))
    list(house.run(start=picture, prompt="a"))
    list(house.run(start=video, prompt="a"))
    (one, other) = house.pipe.asked
    assert number_of(one["image"]) == 1
    assert one["video"] is None
    assert other["image"] is None
    assert other["video"].shape == (10, SIZE, SIZE, 3)
    np.testing.assert_array_equal(number_of(other["video"]), range(0, 20, 2))


def test_a_family_that_goes_on_from_certain_numbers_gets_the_last_frames(house):
    house.pipe.given_frames = lambda count: 9
    write(house.uploads / "in.mp4", greys(12, SIZE, SIZE), rate=int(FPS))
    list(house.run(start=house.uploads / "in.mp4"))
    np.testing.assert_array_equal(number_of(house.pipe.asked[0]["video"]), range(3, 12))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("broken.mp4", b"no video at all", "broken.mp4"),
        ("broken.png", b"\x89PNG\r\n\x1a\n and then nothing", "broken.png"),
        ("empty.mp4", b"", "empty.mp4 is empty"),
        ("list.mp4", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "list.mp4"),
    ],
)
def test_a_broken_upload_is_told_by_its_name_alone(house, name, content, line):
    path = house.uploads / name
    path.write_bytes(content)
    for read in (lambda: house.painter.look(path), lambda: list(house.run(start=path))):
        with pytest.raises(UserError, match=line) as error:
            read()
        assert str(house.uploads) not in str(error.value)
    assert house.session.history == []


def test_a_look_shows_the_first_frame(house):
    write(house.uploads / "in.mp4", greys(4))
    Image.fromarray(greys(3)[2]).save(house.uploads / "in.webp")
    assert number_of(house.painter.look(house.uploads / "in.mp4")) == 0
    assert number_of(house.painter.look(house.uploads / "in.webp")) == 2
    with pytest.raises(UserError, match="no file that was uploaded here"):
        house.painter.look("/etc/passwd")


@pytest.mark.parametrize(
    ("count", "rate", "line"),
    [
        (26, 8, "in.mp4, at 8 a second, has more than 20 frames"),
        (101, 101, "in.mp4 has more than 100 frames"),
    ],
)
def test_a_long_video_is_refused_before_all_of_it_is_read(house, count, rate, line):
    write(house.uploads / "in.mp4", greys(count, SIZE, SIZE), rate=rate)
    with pytest.raises(UserError, match=line):
        list(house.run(start=house.uploads / "in.mp4"))


class Gate:
    """Lets the first clip pass, and the others when it is opened."""

    def __init__(self):
        self.open, self.reached = threading.Event(), threading.Event()

    def __call__(self, index):
        if index > 0:
            self.reached.set()
            assert self.open.wait(WAIT)


def worker_of(house):
    return next(iter(house.painter._threads))


def test_stopping_keeps_the_clips_so_far_and_paints_no_more(house):
    house.pipe.before = gate = Gate()
    run = house.run(num_clips=3)
    shown = next(news for news in run if news.video)
    assert gate.reached.wait(WAIT)
    worker = worker_of(house)
    part = house.session.stop()
    assert list(run) == []
    gate.open.set()
    worker.join(WAIT)
    assert part.video == shown.video
    assert part.said == "The first 1 of 3 clips; then it was stopped."
    assert len(read_video(part.video).frames) == FRAMES
    assert house.session.history == [part]
    house.pipe.before = lambda index: None
    assert list(house.run())[-1].made  # and the next one is painted


def test_whoever_leaves_stops_the_painting(house):
    house.pipe.before = gate = Gate()
    run = house.run(num_clips=3)
    next(news for news in run if news.video)
    worker = worker_of(house)
    run.close()
    gate.open.set()
    worker.join(WAIT)
    assert not worker.is_alive()
    assert house.session.history == []
    assert not any(house.session.folder.iterdir())


def test_a_model_that_cannot_be_loaded_is_called_by_its_name(house):
    folder = house.painter.models[NAME].folder

    def fail(path):
        raise UserError(f"{path}/weights are cut short, see {path.resolve()}")

    house.painter._load = fail
    with pytest.raises(UserError, match=r"^grey/weights are cut short, see grey$") as error:
        list(house.run())
    assert str(folder) not in str(error.value)
    with pytest.raises(UserError, match=str(folder)):  # whoever serves it is told where
        house.painter.preload(NAME)


def test_pictures_are_looked_at_one_at_a_time(house, monkeypatch):
    """Each may have as many pixels as Pillow lets pass."""
    inside, most = [], []

    def read(file):
        inside.append(file)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return greys(1)[0]

    monkeypatch.setattr(painter, "read_image", read)
    Image.fromarray(greys(1)[0]).save(house.uploads / "a.png")
    looks = [
        threading.Thread(target=house.painter.look, args=(house.uploads / "a.png",))
        for _ in range(4)
    ]
    for look in looks:
        look.start()
    for look in looks:
        look.join(WAIT)
    assert most == [1] * 4


def test_a_second_visitor_waits_for_the_first(house):
    house.pipe.before = gate = Gate()
    first, second = house.run(), house.run(house.painter.session(), prompt="other")
    next(news for news in first if news.video)
    next(news for news in second if "somebody else" in news.said)
    assert len(house.pipe.asked) == 1
    gate.open.set()
    assert [list(run)[-1].made.prompt for run in (first, second)] == ["grey", "other"]
    assert house.loads == [house.painter.models[NAME].folder]  # once


def test_one_visitor_paints_one_at_a_time(house):
    house.pipe.before = gate = Gate()
    first = house.run()
    next(news for news in first if news.video)
    with pytest.raises(UserError, match="is being painted for you"):
        list(house.run())
    gate.open.set()
    assert list(first)[-1].made


def test_a_model_without_clips_is_asked_for_frames(tmp_path):
    asked = []
    house = House(tmp_path / "root", takes=frozenset({"num_frames"}), is_batched=False)
    house.load = lambda folder: lambda **call: asked.append(call) or house.pipe("grey")
    house.painter._load = house.load
    list(house.run(num_clips=99, num_frames=8))
    list(house.run(num_clips=99, num_frames=FRAMES))  # its own
    assert [call.get("num_frames") for call in asked] == [8, None]
    assert not any({"num_clips", "clips_per_batch"} & call.keys() for call in asked)
    with pytest.raises(UserError, match="frames: want a whole number from 1 to 20"):
        list(house.run(num_frames=21))
