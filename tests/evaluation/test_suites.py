"""Sums over clips and videos: what each number of a suite is, on drawn clips that are spoilt."""

import json
import re

import numpy as np
import pytest

from dicode_jax.data import shapes_world
from dicode_jax.errors import UserError
from dicode_jax.evaluation import accuracy, kept, long_video, reconstruction, report, tokens
from dicode_jax.evaluation.intervals import Interval
from dicode_jax.evaluation.quality import psnr


def said(motion, size=""):
    return shapes_world.parse_caption(f"a {size}cyan cross {motion} on a navy background")


def scene(motion):
    return shapes_world.sample_scene(np.random.default_rng(3), attributes=said(motion))


def test_a_clip_counts_once_in_all_and_once_in_every_frame():
    one = scene("stays still")
    clip = shapes_world.render(one)[0]
    spoilt = clip.copy()
    spoilt[4] = clip[4, 0, 0]  # nothing is seen in one frame
    rows = [accuracy.judged(one.attributes, x) for x in (clip, spoilt)]
    found = accuracy.summary([*rows, accuracy.judged(said("grows"), clip)])
    assert found["all"].mean == pytest.approx(2 / 3)
    assert found["motion"].mean == pytest.approx(2 / 3)
    assert found["shape in every frame"].mean == pytest.approx(2 / 3)
    assert found["background in every frame"].mean == 1
    assert found["all, and in every frame"].mean == pytest.approx(1 / 3)
    assert found["color wobble"].mean == 0
    with pytest.raises(ValueError, match="nothing"):
        accuracy.summary([])


def test_scenes_are_of_the_test_split_and_another_seed_has_others():
    one, other = (accuracy.scenes(3, seed) for seed in (0, 1))
    assert one == accuracy.scenes(5, 0)[:3]
    assert not set(map(str, one)) & set(map(str, other))
    test = set(shapes_world.all_captions("test"))
    assert {scene.caption for scene in (*one, *other)} <= test
    assert not set(accuracy.seeds(9, 0)) & set(accuracy.seeds(9, 1))


def test_plots_tell_which_word_is_hard():
    words = [said("grows"), said("moves up")]
    clip = shapes_world.render(scene("grows"))[0]
    drawn = {
        plot.name: plot for plot in accuracy.plots(words, [accuracy.judged(w, clip) for w in words])
    }
    assert drawn["by_motion"].x == ["grows", "moves up"]
    assert [x.mean for x in drawn["by_motion"].lines["all"]] == [1.0, 0.0]


def test_reconstruction_sums_errors_before_it_takes_decibels():
    true = np.full((2, 4, 12, 12, 3), 100, np.uint8)
    other = true.copy()
    other[0] += 10
    rows = [reconstruction.measured(a, b) for a, b in zip(true, other)]
    found = reconstruction.summary(rows)
    np.testing.assert_allclose(found["psnr"].mean, 20 * np.log10(255 / np.sqrt(50)), rtol=1e-9)
    np.testing.assert_allclose(found["mean psnr of clips"].mean, psnr(true, other), rtol=1e-9)
    assert found["psnr"].low < found["psnr"].mean < found["psnr"].high
    with pytest.raises(ValueError, match="cannot be compared"):
        reconstruction.measured(true[0], other[0, :2])


def test_each_place_of_a_clip_has_its_own_number_and_an_exact_one_has_no_decibels():
    clip = np.random.default_rng(0).integers(0, 200, (4, 12, 13, 3), np.uint8)
    other = clip.copy()
    other[1] += 51
    rows = [reconstruction.measured(clip, other, lambda a, b: np.arange(4.0))]
    drawn = {plot.name: plot for plot in reconstruction.plots({"model": rows})}
    line = drawn["psnr_by_place"].lines["model"]
    np.testing.assert_allclose(line[1].mean, 20 * np.log10(5), rtol=1e-9)
    assert [x.count for x in line] == [0, 1, 0, 0]
    assert [x.mean for x in drawn["lpips_by_place"].lines["model"]] == [0, 1, 2, 3]
    assert reconstruction.summary(rows)["lpips"].mean == 1.5


def test_floors_repeat_the_keyframes_or_keep_a_thumbnail():
    clip = shapes_world.render(scene("moves up"))[0]
    held = reconstruction.repeated(clip)
    np.testing.assert_array_equal(held, clip[[0] * 8 + [15] * 8])
    flat = np.full_like(clip, 77)
    np.testing.assert_array_equal(reconstruction.thumbnails(flat, 64), flat)
    few, many = (psnr(clip, reconstruction.thumbnails(clip, n)) for n in (48, 1000))
    assert few < many < 40
    halves = np.zeros((1, 64, 64, 3), np.uint8)
    halves[:, :, 32:] = 200
    thumb = reconstruction.thumbnails(halves, 3 * 2 * 2 + 2)  # two by two pixels
    assert len(np.unique(thumb[0, :, :16])) == len(np.unique(thumb[0, :, 48:])) == 1


@pytest.mark.parametrize("motion", ["moves left", "shrinks", "moves in a circle", "stays still"])
def test_a_drawn_video_has_no_borders_no_drift_and_obeys_the_wave(motion):
    one = scene(motion)
    video = shapes_world.render(one, 6).reshape(-1, 64, 64, 3)
    found = long_video.measured(one.attributes, video, 16)
    assert all(clip[name] for clip in found["clips"] for name in long_video.RIGHT)
    assert max(clip["place drift"] for clip in found["clips"]) < 0.2
    assert max(clip["size drift"] + clip["color drift"] for clip in found["clips"]) < 0.01
    ratio = found["border ratio"]
    assert np.isnan(ratio) if motion == "stays still" else ratio == 0


def test_a_long_video_that_jumps_fades_and_does_not_turn_is_found_out():
    one = scene("moves up")
    clips = shapes_world.render(one, 4)
    clips[1] = clips[0]  # goes up again where it should come back
    clips[3] = np.where(clips[3] > 90, clips[3] - 24, clips[3])
    video = clips.reshape(-1, 64, 64, 3)
    found = long_video.measured(one.attributes, video, 16)
    assert [clip["motion"] for clip in found["clips"]] == [True, False, True, True]
    steps = np.abs(np.diff(video.astype(float), axis=0)).mean((1, 2, 3))
    borders, within = steps[15::16].mean(), np.delete(steps, [15, 31, 47]).mean()
    np.testing.assert_allclose(found["border ratio"], borders / within, rtol=1e-9)
    np.testing.assert_allclose(found["clips"][3]["color drift"], 24 * np.sqrt(2), rtol=0.02)
    values = long_video.summary([found])
    assert values["motion"].mean == 0.75
    assert "color drift, minute 1" in values
    assert "color drift, minute 2" not in values
    with pytest.raises(ValueError, match="two clips"):
        long_video.border_ratio(video[:16], 16)


def test_a_report_is_json_and_a_page_with_its_plots(tmp_path):
    plots = [
        report.Plot(name=name, title="a $ b", x_label="x", y_label="y", x=x, lines={"l": y, "m": y})
        for name, x, y in (
            (
                "bars",
                ["red", "blue"],
                [Interval(0.5, 0.25, 0.75, 4), Interval(np.nan, np.nan, np.nan, 0)],
            ),
            ("lines", [0, 1], [0.5, 0.75]),
        )
    ]
    whole = report.Report(
        title="T",
        settings={"model": "a|b"},
        values={"share": Interval(0.5, 0.25, 0.75, 4), "gain": float("nan")},
        notes={"share": "of all"},
        plots=plots,
        rows=[{"right": True}],
    )
    page = report.write(whole, tmp_path, "one").read_text()
    assert "| share | 0.500 | 0.250 to 0.750 | 4 |" in page
    assert "| gain | - | | |" in page
    assert "a\\|b" in page
    held = json.loads((tmp_path / report.JSON_FILE).read_text())["one"]
    assert held["values"] == {
        "share": {"mean": 0.5, "low": 0.25, "high": 0.75, "count": 4},
        "gain": None,
    }
    for plot in plots:
        assert f"({plot.name}.png)" in page
        assert (tmp_path / f"{plot.name}.png").read_bytes()[:4] == b"\x89PNG"


def test_reports_of_one_folder_stay_beside_each_other(tmp_path):
    def write(title, suite):
        one = report.Report(title=title, settings={}, values={"x": float("nan"), "y": 2.0})
        return report.write(one, tmp_path, suite).read_text()

    write("First", "a")
    write("Second", "b")
    page = write("Third", "a")
    assert re.findall("^# (.*)", page, re.MULTILINE) == ["Third", "Second"]
    assert page.count("| x | - |") == page.count("| y | 2.000 |") == 2
    assert report.earlier(tmp_path).keys() == {"a", "b"}
    (tmp_path / report.JSON_FILE).write_text('{"title": "of something else"}')
    with pytest.raises(UserError, match="is not of an evaluation"):
        write("Fourth", "a")


def test_kept_videos_are_not_painted_again_and_others_are_refused(tmp_path):
    calls = []

    def paint(numbers):
        calls.append(list(numbers))
        if 3 in numbers and len(calls) < 3:
            raise KeyboardInterrupt
        return [np.full((2, 4, 5, 3), i, np.uint8) for i in numbers]

    run = lambda **more: kept.painted(paint, 5, tmp_path / "v", {"a": (1,)} | more, at_once=2)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        list(run())
    again = list(run())
    assert [int(x[0, 0, 0, 0]) for x in again] == [0, 1, 2, 3, 4]
    assert calls == [[0, 1], [2, 3], [2, 3], [4]]
    with pytest.raises(UserError, match=r"other settings \(b\)"):
        list(run(b=2))
    (tmp_path / "v/000002.npz").write_bytes(b"x")
    with pytest.raises(UserError, match="is no kept video"):
        list(run())


def test_what_only_becomes_an_array_is_given_as_one(tmp_path):
    class Video:
        def __array__(self, dtype=None, copy=None):
            return np.ones((2, 4, 5, 3), np.uint8)

    (video,) = kept.painted(lambda numbers: [Video()], 1, tmp_path / "v", {})
    assert type(video) is np.ndarray


def test_a_model_whose_files_change_has_another_fingerprint(tmp_path):
    (tmp_path / "a").write_text("1")
    one = kept.fingerprint(tmp_path)
    assert one == kept.fingerprint(tmp_path)
    (tmp_path / "a").write_text("12")
    assert kept.fingerprint(tmp_path) != one


def test_tokens_that_are_taken_away_become_means_of_their_places():
    held = np.random.default_rng(0).normal(size=(3, 2, 5, 4)).astype(np.float32)
    gone = tokens.without(held, 3)
    np.testing.assert_allclose(gone[2, 1, 3], held[:, :, 3].mean((0, 1)), rtol=1e-6)
    np.testing.assert_array_equal(np.delete(gone, 3, axis=2), np.delete(held, 3, axis=2))
    kept = tokens.first(held, 2)
    np.testing.assert_array_equal(kept[:, :, :2], held[:, :, :2])
    np.testing.assert_allclose(kept[1, 0, 4], held[:, :, 4].mean((0, 1)), rtol=1e-6)
    np.testing.assert_array_equal(tokens.first(held, 5), held)


def test_the_way_between_videos_is_straight_and_neighbours_are_the_nearest():
    one, other = np.zeros((2, 3, 4)), np.full((2, 3, 4), 8.0)
    np.testing.assert_array_equal(tokens.between(one, other, 5)[:, 1, 2, 3], [0, 2, 4, 6, 8])
    held = np.array([0.0, 10, 3, 11])[:, None, None, None] * np.ones((1, 2, 3, 4))
    np.testing.assert_array_equal(tokens.nearest(held, 2), [[2, 1], [3, 2], [0, 1], [1, 2]])
