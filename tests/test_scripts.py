"""The small tools that `make demo` uses, run as it runs them, and the trial of planted faults."""

import ast
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny import random_module

from dicode_jax.data import shapes_world as synthetic
from dicode_jax.media.video import read_video, write_video
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D, AutoencoderCausal3DConfig
from dicode_jax.nn.rngs import ShapeRngs
from scripts import encode_in_chunks, int8_weights, mutants, mutation_trial

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


def test_latents_in_chunks_are_near_those_of_the_whole_and_apart():
    cfg = AutoencoderCausal3DConfig(
        channels=2, encoder_mult=(1,), decoder_mult=(1,), encoder_blocks=1, decoder_blocks=1,
        z_channels=2, time_factor=1, num_groups=1,
    )  # fmt: skip
    video = encode_in_chunks.draw(5, 8)
    assert (video.shape, video.dtype) == ((5, 8, 8, 3), np.uint8)
    model = random_module(lambda: AutoencoderCausal3D(cfg, rngs=ShapeRngs()))
    differences, of_frames = encode_in_chunks.compare(model, video)
    assert differences.shape == (5,)  # of three frames and two
    assert 0 < differences.min() < differences.max() < 1
    assert 10 < of_frames < 100


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
