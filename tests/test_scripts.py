"""The small tools that `make demo` uses, run as it runs them, and the trial of planted faults."""

import ast
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dicode_jax.data import shapes_world as synthetic
from dicode_jax.errors import UserError
from dicode_jax.media.video import read_video, write_video
from scripts import int8_weights, mutants, mutation_trial, score_shapes

ROOT = pathlib.Path(__file__).parents[1]


def run(name, *args):
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, args)]
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_drawn_video_is_of_the_test_split_and_two_seconds_a_clip(tmp_path):
    done = run("draw_video.py", "--out", tmp_path / "a.mp4", "--num-clips", 3)
    assert done.returncode == 0, done.stderr
    said = synthetic.parse_caption(done.stdout.strip())
    assert synthetic.is_test(said.color, said.shape, said.motion)
    video = read_video(tmp_path / "a.mp4")
    assert video.frames.shape == (48, 64, 64, 3)
    assert video.fps == pytest.approx(8)


def test_drawn_video_obeys_a_caption_or_says_what_is_wrong(tmp_path):
    caption = "a large white square stays still on a navy background"
    assert run("draw_video.py", "--out", tmp_path / "a.mp4", "--caption", caption).returncode == 0
    corner = read_video(tmp_path / "a.mp4").frames[0, 0, 0].astype(int)
    np.testing.assert_allclose(corner, synthetic.BACKGROUNDS["navy"], atol=12)  # lossy colour
    wrong = run("draw_video.py", "--out", tmp_path / "b.mp4", "--caption", "a dog")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1
    assert not (tmp_path / "b.mp4").exists()


def test_compared_videos_are_shown_at_equal_times(tmp_path):
    # Both turn from black to white after half of their 4 seconds, at different rates and sizes.
    for name, frames, fps, size in (("a.gif", 40, 10, 32), ("b.gif", 20, 5, 24)):
        video = np.zeros((frames, size, size, 3), np.uint8)
        video[frames // 2 :] = 255
        write_video(tmp_path / name, video, fps)
    sheet = tmp_path / "c.png"
    done = run(
        "compare_videos.py", tmp_path / "a.gif", tmp_path / "b.gif", "--out", sheet, "--columns", 6
    )
    assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(sheet).convert("L")).astype(int)
    height, width = picture.shape
    black = (picture < 10).sum(axis=0) > height / 2  # columns that are black in both rows
    assert black[: width // 2].mean() > 0.8
    assert not black[width // 2 :].any()


class Painter:
    """Paints what the captions say, but grey for the last; from keyframes with an error of 10."""

    kind = "dicode"

    def __init__(self):
        self.scenes = [synthetic.scene_at(1007, i, "test") for i in range(3)]
        self.clips = [synthetic.render(scene)[0] for scene in self.scenes]
        self.calls = []

    def __call__(self, captions, **options):
        self.calls.append((captions, options))
        told = {scene.caption: clip for scene, clip in zip(self.scenes[:2], self.clips)}
        return np.stack([told.get(x, np.full_like(self.clips[0], 110)) for x in captions])

    def encode(self, clip):
        return clip

    def decode(self, tokens, **options):
        self.calls.append((len(tokens), options))
        return np.where(tokens < 128, tokens + 10, tokens - 10).astype(np.uint8)


@pytest.fixture
def score(monkeypatch, capsys):
    """Runs the script in this process; gives what it prints as numbers by name."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["score_shapes.py", *map(str, words)])
        score_shapes.main()
        said = capsys.readouterr().out
        return {name: float(number) for name, number in map(str.split, said.splitlines())}

    return run


def test_clips_are_scored_by_what_their_captions_say(score, monkeypatch, tmp_path):
    painter = Painter()
    monkeypatch.setattr(score_shapes, "load", lambda model: painter)
    words = ("--num-prompts", 3, "--batch-size", 2, "--seed", 7, "--steps", 4)
    found = score(*words, "--sheet", tmp_path / "s.png")
    captions = [scene.caption for scene in painter.scenes]
    said = {"num_inference_steps": 4, "guidance_scale": None}
    assert painter.calls == [
        (captions[:2], said | {"seed": 7}),
        (captions[2:], said | {"seed": 9}),
    ]
    assert found.pop("count") == 3
    assert found == dict.fromkeys(("color", "shape", "motion", "size", "all"), 0.667) | {
        "background": found["background"]
    }
    assert Image.open(tmp_path / "s.png").height > 64
    painter.calls.clear()
    found = score(*words, "--guidance-scale", 2, "--reconstruct")
    said["guidance_scale"] = 2.0
    assert painter.calls == [(2, said | {"seed": 7}), (1, said | {"seed": 9})]
    assert found["all"] == 1
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / 10), abs=0.005)  # two decimals


def test_a_lag_is_for_models_that_have_one_and_keyframes_for_the_others(score, monkeypatch):
    painter = Painter()
    monkeypatch.setattr(score_shapes, "load", lambda model: painter)
    with pytest.raises(UserError, match="--lag is for AR-Diffusion"):
        score("--lag", 3)
    painter.kind = "ar_diffusion"
    score("--num-prompts", 1, "--lag", 3, "--seed", 7)
    assert painter.calls[0][1]["lag"] == 3
    with pytest.raises(UserError, match="--reconstruct is for DiCoDe"):
        score("--reconstruct")


@pytest.mark.slow
@pytest.mark.long
def test_the_packaged_model_paints_as_closely_as_its_page_says(score):
    page = (ROOT / "dicode_jax/assets/shapes/README.md").read_text()
    ((words, level),) = re.findall(
        r"`python scripts/score_shapes.py ([^`]* --reconstruct)` takes[^`]* have ([\d.]+) dB", page
    )
    found = score(*words.split())
    assert found["psnr"] == pytest.approx(float(level), abs=0.1)  # one decimal, and rounding
    assert found["all"] == 1


def test_what_cannot_be_scored_is_one_line(score, monkeypatch, tmp_path):
    monkeypatch.setattr(score_shapes, "load", lambda model: Painter())
    for wrong in ("--num-prompts", "--batch-size"):
        with pytest.raises(UserError, match="must be at least 1"):
            score(wrong, 0)
    monkeypatch.setattr(Painter, "decode", lambda self, x, **_: np.zeros((len(x), 4, 8, 8, 3)))
    with pytest.raises(
        UserError, match=r"\(16, 64, 64, 3\) in the shapes world, not \(4, 8, 8, 3\)"
    ):
        score("--num-prompts", 1, "--reconstruct")
    done = run("score_shapes.py", "--model", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


CODE = '''
"""Text: 1 + 1."""
__all__ = ["f", "g"][0:]

def f(x: int = 1, *, flag: bool = True) -> "1 + 1":
    if not x < 2 and flag:
        raise ValueError(f"{x + 1} is not {min(x, 2)}", 3)
    return g(x, flag, key=x)[-1] ** x, "a" + "b", zip(x, x, strict=True), x[0]
'''
FAULTS = """1 -> 2; True -> False; not x < 2 -> x < 2; < -> <=; < -> >; 2 -> 3; and -> or; ** -> *;
    x, flag -> flag, x; key=x -> nothing; -1 -> 0; 0 -> -1"""


def test_faults_are_planted_in_code_alone_one_at_a_time():
    found = mutants.mutants_of("a.py", CODE)
    assert sorted(f"{x.before} -> {x.after or 'nothing'}" for x in found) == sorted(
        fault.strip() for fault in FAULTS.split(";")
    )
    assert len({x.plant(CODE.encode()) for x in found}) == len(found)
    for fault in found:
        ast.parse(fault.plant(CODE.encode()))


@pytest.fixture
def tree(tmp_path):
    """A library of one function with its test."""
    code = ["def count(x):", "    n = 0", "    while n < x:", "        n += 1", "    return n"]
    test = [
        "from dicode_jax.text.cut import count",
        "def test_count():",
        "    assert count(3) == 3",
    ]
    for name, lines in {"dicode_jax/text/cut.py": code, "tests/text/test_cut.py": test}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("\n".join(lines))
    return tmp_path


def test_the_same_faults_are_drawn_of_the_same_tree(tree):
    drawn = mutation_trial.draw(tree, 3, seed=1)
    assert drawn == mutation_trial.draw(tree, 3, seed=1)
    assert len(set(drawn)) == 3
    assert drawn != mutation_trial.draw(tree, 3, seed=2)
    everything = mutation_trial.draw(tree, 99, seed=2)
    assert sorted(everything) == sorted(mutation_trial.draw(tree, 99, seed=1))


def test_a_fault_is_noticed_by_a_test_or_a_hang_and_a_harmless_one_is_not(tree):
    text = (tree / "dicode_jax/text/cut.py").read_text()
    faults = {(x.before, x.after): x for x in mutation_trial.draw(tree, 99, seed=0)}
    assert set(faults) == {("<", "<="), ("<", ">"), ("0", "1"), ("1", "2")}
    test = "tests/text/test_cut.py::test_count"
    for fault, limit, wanted in (
        (faults["<", "<="], 60, test),
        (faults["0", "1"], 60, None),
        (faults["1", "2"]._replace(after="0"), 2, "time limit of 2 s"),
    ):
        assert mutation_trial.trial(tree, fault, "text/test_cut.py", limit)[0] == wanted
        assert (tree / "dicode_jax/text/cut.py").read_text() == text


def test_eight_bits_keep_each_channel_within_half_a_step_of_its_own():
    layer = nnx.Linear(7, 3, rngs=nnx.Rngs(0))
    kernel = np.asarray(layer.kernel[...]) * [1.0, 100.0, 0.0]
    error = np.abs(int8_weights.rounded(kernel) - kernel)
    steps = np.abs(kernel).max(0) / 127
    assert (error <= steps / 2 * 1.0001 + 1e-30).all()
    assert (error.max(0)[:2] > steps[:2] / 20).all()
    size = int8_weights.sizes(layer)  # 21 weights, 3 scales and 3 biases
    assert size == {"bfloat16_bytes": 48, "int8_bytes": 39, "share_of_linear": 21 / 24}
