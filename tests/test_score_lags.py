"""What the scores of lags are made of, on a pipeline that draws what it is asked for."""

import types

import numpy as np
import pytest
from PIL import Image

from dicode_jax.data import shapes_world
from dicode_jax.errors import UserError
from scripts import score_lags

SCENES = [shapes_world.scene_at(3, i, "test") for i in range(3)]


class Pipe:
    """True clips for a lag above 0, black ones without; the second half of a long video is black.

    With history noise it is not.
    """

    config = types.SimpleNamespace(sampling=types.SimpleNamespace(num_inference_steps=50))

    def __call__(self, captions, *, num_frames, lag, seed, history_noise=0, **options):
        assert captions == [scene.caption for scene in SCENES]
        video = np.stack([shapes_world.render(scene)[0] for scene in SCENES])
        video = np.tile(video, (1, num_frames // 16, 1, 1, 1)) * (lag > 0)
        video[:, 16:] *= history_noise > 0
        return video.astype(np.uint8)


def features(clips):
    return np.stack(clips).mean(axis=(2, 3)).reshape(len(clips), -1)[:, :6].astype(np.float64)


def test_lags_are_scored_against_captions_with_their_calls():
    found = score_lags.score(Pipe(), SCENES, (0, 5), {"seed": 1}, features)
    assert [row["calls"] for row in found.values()] == [50, 125]
    for field in (*score_lags.FIELDS, "all"):
        assert found["5"][field] == [1, 1, 1]
    assert found["0"]["color"] == found["0"]["all"] == [0, 0, 0]
    assert found["5"]["fd_shapes"] < 1e-6 < found["0"]["fd_shapes"]
    first, _, *rows = score_lags.table(found).splitlines()
    assert first.count("|") == rows[0].count("|")
    assert rows[1].startswith("| 5 | 125 | ")


def test_drift_is_told_for_each_sixteen_frames_and_drawn(tmp_path):
    drifts = score_lags.drift(Pipe(), SCENES, 32, (0, 20), {"seed": 1, "lag": 5})
    shares = {noise: [part["all"][0] for part in parts] for noise, parts in drifts.items()}
    assert shares == {"0": [1, 0], "20": [1, 1]}
    lags = score_lags.score(Pipe(), SCENES, (0, 5), {"seed": 1}, features)
    score_lags.plot(lags, drifts, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-clips", "1"], "--num-clips must be at least 2"),
        (["--num-frames", "40"], "a multiple of 16"),
        (["--model", "shapes"], "which has no lag"),
        (["--out", "a.txt"], "a.txt"),
    ],
)
def test_what_cannot_be_scored_is_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        score_lags.main(["--out", "a.json", "--plot", "a.png", *arguments])
