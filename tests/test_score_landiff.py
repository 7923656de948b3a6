"""What the scores of a small LanDiff are made of, on a pipeline that draws what it is asked for."""

import types

import numpy as np
import pytest
from PIL import Image

from dicode_jax.data import shapes_world
from dicode_jax.errors import UserError
from dicode_jax.models.landiff.motion import frame_motion
from scripts import score_landiff

SCENES = [shapes_world.scene_at(3, i, "test") for i in range(2)]
FIRST, MORE = 17, 8


class Pipe:
    """True clips with guidance, black ones at 1; still for a motion score of 0.

    Further windows of a stream that encodes frames anew begin with a flash.
    """

    config = types.SimpleNamespace(fps=8.0)

    def num_frames(self, num_clips):
        return FIRST + MORE * (num_clips - 1)

    def __call__(self, captions, *, num_clips=1, guidance_scale=2.0, motion_score=0.5, **options):
        assert captions == [scene.caption for scene in SCENES]
        length = self.num_frames(num_clips)
        video = np.stack([shapes_world.render(s, num_frames=length)[0] for s in SCENES])
        if guidance_scale == 1:
            video[:] = 0
        if motion_score == 0:
            video[:] = video[:, :1]
        if options.get("carry") == "frames":
            video[:, FIRST::MORE] = 255 * (options["history_noise"] == 0)
        return video


def test_guidance_is_scored_against_captions_and_motion_by_its_own_measure():
    told = score_landiff.guidance(Pipe(), SCENES, (1.0, 2.0), {"seed": 1})
    assert told["1.0"]["all"][0] == 0
    assert told["2.0"]["color"] == told["2.0"]["background"] == [1, 1, 1]
    moved = score_landiff.motion(Pipe(), SCENES, (0.0, 0.5), {"seed": 1})
    drawn = [shapes_world.render(scene, num_frames=FIRST)[0] for scene in SCENES]
    want = np.mean([frame_motion(clip)[1:].mean() for clip in drawn])
    assert moved["0.0"] == [0, 0, 0]
    np.testing.assert_allclose(moved["0.5"][0], want, rtol=1e-5)


def test_borders_are_those_of_windows_for_each_way_to_go_on():
    found = score_landiff.joins(Pipe(), SCENES, 4, (0, 50), {"seed": 1})
    assert list(found) == [
        f"{c}, history noise {t}" for c in ("latents", "frames") for t in (0, 50)
    ]
    assert found["latents, history noise 0"]["border"][0] < 2
    assert found["frames, history noise 0"]["border"][0] > 5
    assert found["frames, history noise 50"]["border"][0] > 1


def test_what_was_found_is_told_and_drawn(tmp_path):
    found = {
        "guidance": score_landiff.guidance(Pipe(), SCENES, (1.0, 2.0), {}),
        "motion": {"0.0": [0.001, 0.0, 0.002], "0.5": [0.009, 0.008, 0.01]},
        "joins": {"latents, history noise 0": {"border": [1.1, 1.0, 1.2], "last": [1, 1, 1]}},
    }
    lines = score_landiff.tables(found).splitlines()
    assert "| 0.5 | 9.00 (8.00 to 10.00) |" in lines
    assert "| latents, history noise 0 | 1.10 (1.00 to 1.20) | 1.00 (1.00 to 1.00) |" in lines
    assert lines[0].count("|") == lines[2].count("|")
    score_landiff.plot(found, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--windows", "1"], "--windows at least 2"),
        (["--model", "shapes"], "and this scores LanDiff"),
        (["--out", "a.txt"], "a.txt"),
    ],
)
def test_what_cannot_be_scored_is_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        score_landiff.main(["--out", "a.json", "--plot", "a.png", *arguments])
