"""`dicode data cut`: films to clips of one scene each."""

import itertools
import json
import signal

import numpy as np
import pytest
from media_files import greys, number_of, write

from dicode_jax import cli
from dicode_jax.data import scenes
from dicode_jax.data.scenes import CutConfig, cut_film
from dicode_jax.errors import UserError
from dicode_jax.media.video import Frame, read_video

pytest.importorskip("scenedetect")

COLOURS = ((200, 30, 30), (20, 160, 60), (40, 60, 220))
LENGTHS = (20, 6, 38)  # frames of the scenes, 8 a second


def film_frames(lengths=LENGTHS):
    """Scenes of one colour each, in which a bright column moves by a pixel each frame."""
    for colour, length in zip(itertools.cycle(COLOURS), lengths):
        for number in range(length):
            image = np.broadcast_to(np.array(colour, np.uint8), (32, 48, 3)).copy()
            image[:, number % 48] = 255
            yield image


@pytest.fixture
def film(tmp_path):
    path = tmp_path / "a.film.mp4"
    write(path, np.stack(list(film_frames())))
    return path


def listed(out, stem="a_film"):
    head, *clips = map(json.loads, (out / f"{stem}.scenes.jsonl").read_text().splitlines())
    return head, clips


def test_clips_hold_one_scene_each_and_are_called_by_film_and_time(film, tmp_path, capsys):
    out = tmp_path / "clips"
    argv = ["data", "cut", str(film), "--out", str(out), "--min-seconds", "1", "--max-seconds", "3"]
    assert cli.main(argv) == 0
    names = ["a_film_00h00m00s000.mp4", "a_film_00h00m03s250.mp4", "a_film_00h00m06s250.mp4"]
    assert sorted(path.name for path in out.iterdir()) == ["a_film.scenes.jsonl", *names]
    assert capsys.readouterr().out == f"{film}: 3 scenes, 3 clips written\n"
    head, clips = listed(out)
    assert (head["film"], head["scenes"], head["threshold"]) == ("a.film.mp4", 3, 27.0)
    assert [(clip["start"], clip["end"]) for clip in clips] == [(0, 2.5), (3.25, 6.25), (6.25, 8.0)]
    for name, count, colour in zip(names, (20, 24, 14), (COLOURS[0], COLOURS[2], COLOURS[2])):
        video = read_video(out / name)
        assert video.frames.shape == (count, 32, 48, 3)
        assert video.fps == pytest.approx(8)
        body = video.frames[:, 8:24].astype(int)
        middle = np.median(body, axis=(1, 2))  # the column is few of the pixels
        np.testing.assert_allclose(middle, np.broadcast_to(colour, middle.shape), atol=12)


def test_the_first_frame_of_a_clip_is_the_first_of_its_scene(film, tmp_path):
    cut_film(film, tmp_path / "clips", CutConfig(min_seconds=0))
    for name, length in zip(("00h00m00s000", "00h00m02s500", "00h00m03s250"), LENGTHS):
        frames = read_video(tmp_path / "clips" / f"a_film_{name}.mp4").frames
        columns = frames.astype(int).sum(axis=(1, 3)).argmax(axis=1)
        np.testing.assert_array_equal(columns, np.arange(length) % 48)


def test_rounded_time_stamps_cost_and_double_no_frame(tmp_path):
    film, count = tmp_path / "film.mp4", 40
    write(film, greys(count), times=[round(100 * i / 24) for i in range(count)])
    (clip,) = cut_film(film, tmp_path / "clips", CutConfig(min_seconds=1)).clips
    frames = read_video(tmp_path / "clips" / clip.video).frames
    np.testing.assert_array_equal(number_of(frames), np.arange(count))


def test_a_stopped_run_goes_on_and_what_is_there_stays(film, tmp_path, monkeypatch, capsys):
    out = tmp_path / "clips"
    append, count = scenes.VideoWriter.append, 0

    def stop(self, frames):
        nonlocal count
        count += 1
        if count == 30:
            signal.raise_signal(signal.SIGTERM)
        append(self, frames)

    with monkeypatch.context() as patch:
        patch.setattr(scenes.VideoWriter, "append", stop)
        assert cli.main(["data", "cut", str(film), "--out", str(out)]) == 143
    first = out / "a_film_00h00m00s000.mp4"
    assert sorted(out.iterdir()) == [out / "a_film.scenes.jsonl", first]
    before = first.stat()
    torn = out / ".a_film_00h00m03s250-0123abcd.mp4"
    torn.touch()  # of a kill
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "find_cuts", None)  # they are known
        assert cli.main(["data", "cut", str(film), "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith("3 scenes, 1 clips written, 1 were there\n")
    assert not torn.exists()
    assert first.stat() == before
    assert len(read_video(out / "a_film_00h00m03s250.mp4").frames) == LENGTHS[2]


def test_nothing_of_another_cutting_is_replaced(film, tmp_path):
    out = tmp_path / "clips"
    out.mkdir()
    (out / "a_film_00h00m03s250.mp4").write_text("mine")
    with pytest.raises(UserError, match="is there and not of this film"):
        cut_film(film, out)
    assert [path.name for path in out.iterdir()] == ["a_film_00h00m03s250.mp4"]
    (out / "a_film_00h00m03s250.mp4").unlink()
    assert cut_film(film, out).num_written == 2
    with pytest.raises(UserError, match=r"threshold was 27.0, is 30; name another folder"):
        cut_film(film, out, CutConfig(threshold=30))
    (out / "a_film.scenes.jsonl").write_text('{"film": 3}\n')
    with pytest.raises(UserError, match="is damaged"):
        cut_film(film, out)


def test_films_that_cannot_be_cut_do_not_stop_the_others(film, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(film.read_bytes()[:-900])
    out = tmp_path / "clips"
    assert cli.main(["data", "cut", str(broken), "x.mp4", str(film), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert "3 scenes, 2 clips written" in said.out
    assert said.err.startswith("dicode: error: 2 of 3 films: ")
    assert "there is no file x.mp4" in said.err
    assert len(said.err.splitlines()) == 1
    assert not list(out.glob("broken*"))
    assert cli.main(["data", "cut", "x.mp4", "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


def test_an_uneven_rate_is_cut_where_the_scene_begins():
    times = [0, 0.1, 0.5, 0.6, 1.4, 1.5, 2.0, 2.1]
    images = [np.full((32, 48, 3), 30 if time < 1.4 else 200, np.uint8) for time in times]
    frames = [Frame(image=x, time=t, duration=0.1) for x, t in zip(images, times)]
    found, end = scenes.find_cuts(iter(frames), 27)
    assert found.cuts == [1.4]
    assert end == pytest.approx(2.4)  # the last frame stays for a mean step


@pytest.mark.parametrize(
    ("longest", "wanted"),
    [
        (60, [(0, 5), (6, 13)]),
        (3, [(0, 3), (3, 5), (6, 9), (9, 12)]),  # of the second scene one second is left
        (7, [(0, 5), (6, 13)]),
    ],
)
def test_long_scenes_are_divided_and_short_ones_left_out(longest, wanted):
    assert scenes.divide([5, 6], 13, CutConfig(max_seconds=longest)) == wanted


@pytest.mark.parametrize(
    "wrong", [{"threshold": 0}, {"min_seconds": 3, "max_seconds": 2}, {"max_seconds": np.nan}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        CutConfig(**wrong)


def test_without_pyscenedetect_one_line_says_what_to_install(film, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "scenedetect", None)
    assert cli.main(["data", "cut", str(film), "--out", str(tmp_path / "out")]) == 2
    assert 'pip install "dicode-jax[data]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
