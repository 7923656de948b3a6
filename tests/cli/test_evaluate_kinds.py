"""`dicode evaluate` of LanDiff models, and its suite `text`."""

import types

import evaluating
import numpy as np
import pytest
from evaluating import Painter, listed, means

from dicode_jax.cli import evaluate
from dicode_jax.data import shapes_world
from dicode_jax.evaluation import accuracy, text

run = evaluating.run


def test_of_a_landiff_the_first_two_seconds_are_judged(run, capsys):
    painter = Painter("landiff")
    call = painter.__call__
    paint = lambda prompts, **options: np.concatenate(  # noqa: E731
        [call(prompts, **options), np.zeros((len(prompts), 9, 64, 64, 3), np.uint8)], axis=1
    )
    more = type("Longer", (), {"__call__": lambda self, prompts, **o: paint(prompts, **o)})()
    vars(more).update(vars(painter))
    assert means(run(more, "--num", 3, "--steps", 2)[1])["all"] == pytest.approx(2 / 3)
    assert painter.calls[0][1] == {"seed": accuracy.seeds(3, 2), "num_inference_steps": 2}
    assert run(more, "--num-frames", 16, out="b")[0] == 2
    assert "has no num_frames" in capsys.readouterr().err


class Windows(Painter):
    """Of 17 frames, and 8 more for each further one."""

    frame_size = 64, 64

    def __init__(self):
        super().__init__("landiff")

    def num_frames(self, count):
        return 9 + 8 * count

    def __call__(self, prompts, *, num_clips, **options):
        whole = super().__call__(prompts, num_clips=8, **options)[:, : self.num_frames(num_clips)]
        whole[:, -8:, 0, 0] += 100  # a step at the border of the last window
        return whole

    def reconstruct(self, clip, prompt, *, seed, **options):
        self.calls.append((prompt, {"seed": seed, **options}))
        return super().reconstruct(clip)[None]


def test_a_landiff_is_judged_by_its_own_windows():
    painter = Windows()
    options = types.SimpleNamespace(num_clips=None, num_frames=None)
    of = types.SimpleNamespace(pipe=painter, args=options)
    assert evaluate._long_plan(of) == ({"num_clips": 59}, 16, range(17, 481, 8))


def test_a_landiff_has_borders_and_comes_back_from_its_tokens(run):
    painter = Windows()
    painter.last = None  # all as they should be
    status, found = run(painter, "--suite", "long", "--num", 3, "--num-clips", 3)
    assert status == 0
    assert [len(row["clips"]) for row in found["rows"]] == [2, 2, 2]
    values = means(found)
    assert values["color"] == values["motion"] == 1
    assert values["border ratio"] > 1
    painter.calls.clear()
    status, found = run(painter, "--suite", "reconstruction", "--num", 3, out="b")
    assert status == 0
    want = [(p, {"seed": s}) for p, s in zip(painter.scenes, accuracy.seeds(3, 2))]
    assert painter.calls == want
    assert means(found)["psnr"] == pytest.approx(10 * np.log10(255**2 / 100), abs=0.01)


@pytest.fixture
def towers(monkeypatch):
    """Embeds a frame and a prompt by the colours that they show and name."""
    colors = np.array([*shapes_world.COLORS.values()], np.float32)

    def images(frames):
        middle = frames.reshape(len(frames), -1, 3).astype(np.float32)
        share = [(np.abs(middle - color).max(-1) < 30).mean(-1) for color in colors]
        found = np.stack([*share, np.full(len(frames), 1e-3)], axis=1)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def texts(prompts):
        return np.array(
            [[*(f" {c} " in f" {p} " for c in shapes_world.COLORS), 0] for p in prompts]
        )

    made = text.Towers(digest="0", images=images, texts=texts)
    monkeypatch.setattr(text, "load", lambda folder: made)


def test_videos_are_near_to_captions_that_they_show(run, towers):
    painter = Painter()
    status, found = run(painter, "--suite", "text", "--clip", "c", "--num", 3)
    assert status == 0
    values = means(found)
    assert values["CLIPSIM"] == pytest.approx(2 / 3, abs=0.01)  # the last one is grey
    assert values["CLIP score"] == pytest.approx(100 * values["CLIPSIM"])
    assert values["all"] == pytest.approx(2 / 3)
    assert found["settings"]["CLIP"] == "c, weights 0"
    assert len(found["rows"][0]["clipsim"]) == 16
    assert run(painter, "--num", 3)[0] == 0  # of the same clips
    assert len(painter.calls) == 1


def test_prompts_of_a_file_take_the_place_of_captions(run, towers, tmp_path, capsys):
    painter = Painter()
    one, two, _ = painter.scenes
    path = listed(tmp_path / "list.txt", one, two)
    words = ("--suite", "text", "--clip", "c", "--prompts", path, "--samples-per-prompt", 2)
    status, found = run(painter, *words)
    assert status == 0
    assert [row["prompt"] for row in found["rows"]] == [one, one, two, two]
    assert found["settings"]["videos"] == found["values"]["CLIPSIM"]["count"] == 4
    assert means(found)["CLIPSIM"] > 0.99
    assert "all" not in found["values"]
    assert run(painter, "--suite", "text", "--clip", "c", "--vbench-prompts", path)[0] == 2
    for column, value in (("seed", 3), ("num_clips", 2)):
        table = listed(tmp_path / "list.csv", f"prompt,{column}", f"{one},", f"{two},{value}")
        assert run(painter, *words[:5], table, out="more")[0] == 2
        assert "prompt 2: the suite text reads prompts alone" in (err := capsys.readouterr().err)
        assert f"leave {column} out" in err
