"""The command line over a real, tiny, untrained pipeline in a folder."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import NUM_FRAMES, NUM_TOKENS, TOKEN_DIM, tiny_pipeline

from dicode_jax import cli
from dicode_jax.cli.video import read_arrays
from dicode_jax.data import shapes_world as synthetic
from dicode_jax.media import video

PROMPT = "a red circle moves right on a black background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny pipeline on disk; not to be changed."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def broken(folder, work):
    """A copy of the model that a test may break."""
    shutil.copytree(folder, work / "broken")
    return work / "broken"


def line_of(capsys, *argv):
    """Runs a command that must fail; returns its only line."""
    assert cli.main([*map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1, err
    return err


def test_a_prompt_becomes_a_video_that_the_seed_decides(folder, work, capsys):
    argv = ["generate", PROMPT, "--model", str(folder), "--num-clips", "2"]
    assert cli.main([*argv, "--out", "a.webp", "--sheet", "a.png"]) == 0
    assert cli.main([*argv, "--out", "b.webp"]) == 0
    assert cli.main([*argv, "--out", "c.webp", "--seed", "1"]) == 0
    a, b, c = (video.read_video(f"{name}.webp").frames for name in "abc")
    assert a.shape == (2 * NUM_FRAMES, 16, 16, 3)
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert (work / "a.png").is_file()
    assert not capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_encode_and_decode_are_reconstruct(folder, work):
    scene = synthetic.scene_at(0, 3)
    video.write_video("in.mp4", synthetic.render(scene, 2, frame_size=40).reshape(-1, 40, 40, 3))
    model = ["--model", str(folder), "--seed", "4", "--steps", "3"]
    assert cli.main(["encode", "in.mp4", "--out", "t.safetensors", *model[:2]]) == 0
    assert read_arrays("t.safetensors")["tokens"].shape == (3, NUM_TOKENS, TOKEN_DIM)
    assert cli.main(["decode", "t.safetensors", "--out", "a.webp", *model]) == 0
    assert cli.main(["reconstruct", "in.mp4", "--out", "b.webp", *model]) == 0
    a, b = (video.read_video(f"{name}.webp").frames for name in "ab")
    assert a.shape == (2 * NUM_FRAMES, 16, 16, 3)
    np.testing.assert_array_equal(a, b)


def test_info_counts_what_lies_in_the_folder(folder, capsys):
    assert cli.main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    for part in ("tokenizer", "decoder", "language_model"):
        arrays = load_file(folder / part / "model.safetensors")
        assert f"{sum(array.size for array in arrays.values()):,} parameters" in out
    assert f"{NUM_TOKENS} deep tokens of {TOKEN_DIM} numbers" in out


@pytest.mark.slow
def test_a_long_prompt_is_cut_with_a_warning(folder, work, capsys):
    argv = ["generate", "red " * 20, "--out", "a.gif", "--model", str(folder), "--steps", "1"]
    assert cli.main(argv) == 0
    err = capsys.readouterr().err
    assert err.startswith("dicode: warning: the prompt has 20 tokens")
    assert err.count("\n") == 1


def test_what_cannot_be_spelled_is_named(folder, work, capsys):
    line = line_of(capsys, "generate", "a réd circle", "--out", "a.mp4", "--model", folder)
    assert "'é'" in line


def test_tokens_of_another_model_are_refused(folder, work, capsys):
    save_file({"tokens": np.zeros((2, 5, TOKEN_DIM), np.float32)}, "t.safetensors")
    line = line_of(capsys, "decode", "t.safetensors", "--out", "a.mp4", "--model", folder)
    assert f"{NUM_TOKENS} tokens of width {TOKEN_DIM}" in line


def test_an_unknown_model_is_refused(work, capsys):
    line = line_of(capsys, "generate", PROMPT, "--out", "a.mp4", "--model", "nowhere")
    assert "no model 'nowhere'" in line
    (work / "empty").mkdir()
    line = line_of(capsys, "info", "empty")
    assert "is not a model" in line


def test_weights_that_do_not_fit_are_refused(broken, capsys):
    file = broken / "decoder" / "model.safetensors"
    arrays = load_file(file)
    first, *_ = sorted(arrays)
    save_file({name: array for name, array in arrays.items() if name != first}, file)
    assert f"missing {first}" in line_of(capsys, "info", broken)
    save_file(arrays | {first: np.zeros((2, 2), np.float32)}, file)
    assert f"{first} has shape (2, 2)" in line_of(capsys, "info", broken)
    file.write_bytes(file.read_bytes()[:-9])
    assert "not a whole safetensors file" in line_of(capsys, "info", broken)
    file.unlink()
    assert "no weights at" in line_of(capsys, "info", broken)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), (json.dumps({"frame_sise": 3}), "does not fit PipelineConfig")],
)
def test_a_broken_config_is_refused(broken, capsys, content, message):
    (broken / "config.json").write_text(content)
    assert message in line_of(capsys, "info", broken)


def test_a_model_without_its_vocabulary_is_refused(broken, capsys):
    shutil.rmtree(broken / "text")
    assert "no tokenizer in" in line_of(capsys, "info", broken)


@pytest.mark.parametrize(("value", "message"), [(np.nan, "weights of"), (3e38, "NaN or infinite")])
@pytest.mark.parametrize(
    ("command", "part"),
    [
        (["generate", PROMPT], "language_model"),
        (["generate", PROMPT], "decoder"),
        (["reconstruct", "in.mp4"], "decoder"),
        (["encode", "in.mp4"], "tokenizer"),
        (["decode", "t.safetensors"], "decoder"),
    ],
)
def test_what_is_no_number_costs_one_line_and_leaves_no_file(
    broken, work, capsys, command, part, value, message
):
    """In the file already, or only when finite weights are multiplied."""
    scene = synthetic.scene_at(0, 3)
    video.write_video("in.mp4", synthetic.render(scene, 1, frame_size=16).reshape(-1, 16, 16, 3))
    save_file({"tokens": np.zeros((2, NUM_TOKENS, TOKEN_DIM), np.float32)}, "t.safetensors")
    path = broken / part / "model.safetensors"
    arrays = load_file(path)
    name = max(arrays, key=lambda name: arrays[name].size)
    save_file(arrays | {name: np.full_like(arrays[name], value)}, path)
    before = sorted(work.iterdir())
    out = "out.safetensors" if command[0] == "encode" else "out.mp4"
    line = line_of(capsys, *command, "--out", out, "--model", broken)
    assert message in line
    assert part in line
    assert sorted(work.iterdir()) == before
