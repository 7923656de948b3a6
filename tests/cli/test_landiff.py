"""`dicode` with a model of LanDiff: prompts, videos and semantic tokens in and out."""

import pathlib
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_landiff_pipeline import make, video

from dicode_jax import cli
from dicode_jax.media import video as media

PROMPT = "a red circle grows on a black background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    make().save_pretrained(path)
    return str(path)


def line_of(capsys, *argv):
    capsys.readouterr()
    assert cli.main([*map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1, err
    return err


@pytest.mark.slow
@pytest.mark.long
def test_clips_are_written_as_they_are_painted(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    media.write_video("in.webp", video(12), fps=8)
    argv = ["generate", PROMPT, "--video", "in.webp", "--num-clips", 2, "--model", folder]
    argv += ["--out", "out.webp", "--sheet", "sheet.png", "--history-noise", 50, "--steps", 2]
    argv += ["--motion-score", 0.5, "--top-k", 3, "--carry", "latents"]
    assert cli.main([*map(str, argv)]) == 0
    out = capsys.readouterr().out
    assert "in.webp: goes on from the last 9 of its 12 frames" in out
    assert "the language model takes 0.005892 MB" in out
    assert "out.webp: 25 frames of 24 x 16, 3.125 s" in out
    frames = media.read_video("out.webp").frames
    np.testing.assert_array_equal(frames[:9], video(12)[3:])
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.slow
@pytest.mark.long
def test_a_video_becomes_tokens_and_these_a_video(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    media.write_video("in.webp", video(20), fps=8)
    assert cli.main(["encode", "in.webp", "--out", "t.safetensors", "--model", folder]) == 0
    out = capsys.readouterr().out
    assert "in.webp: the first 17 of its 20 frames" in out
    assert "t.safetensors: 9 tokens of 17 frames" in out
    assert load_file("t.safetensors")["semantic_tokens"].shape == (9,)
    assert cli.main(["info", "t.safetensors"]) == 0
    assert "t.safetensors: 9 semantic tokens of LanDiff" in capsys.readouterr().out
    argv = ["decode", "t.safetensors", "--out", "a.webp", "--caption", PROMPT, "--model", folder]
    assert cli.main([*argv, "--offload"]) == 0
    argv = ["reconstruct", "in.webp", "--out", "b.webp", "--caption", PROMPT, "--model", folder]
    assert cli.main(argv) == 0
    a, b = (media.read_video(name).frames for name in ("a.webp", "b.webp"))
    assert a.shape == (17, 16, 24, 3)
    np.testing.assert_array_equal(a, b)


def test_info_says_what_it_makes(folder, capsys):
    assert cli.main(["info", folder]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["kind"] == "landiff"
    assert told["clip"] == "17 frames of 24 x 16 at 8 a second"
    assert told["further"] == "clips    8 frames each, carried by latents"
    assert told["tokens"] == "3 of the first frame of 3, 1 of each other, 5 codes"
    assert told["sampling"] == "2 steps, guidance 6; language model guidance 7.5, motion 0.1"
    assert told["text"] == "16 and 15 tokens"
    assert told["reads"] == "frames too"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("generate --out x.mp4", "the prompt is empty"),
        ("generate circle --num-frames 4 --out x.mp4", "leave --num-frames and --clips-per-batch"),
        ("generate circle --eta 1 --out x.mp4", "has one sampler; leave --eta out"),
        ("generate circle --lag 1 --out x.mp4", "leave --last-image and --lag out"),
        ("generate circle --top-k 1 --top-p 0.5 --out x.mp4", "exclude each other"),
        ("generate horse --out x.mp4", "has never seen: horse"),
        ("generate circle --motion-score=-1 --out x.mp4", "want a finite number of at least 0"),
        ("reconstruct in.webp --keyframes demo --out x.mp4", "leave --keyframes out"),
        ("decode t.safetensors --out x.mp4", "holds tokens; .*'landiff', decodes semantic_tokens"),
        ("decode s.safetensors --out x.mp4", "8 tokens are 4 semantic frames"),
        ("decode f.safetensors --out x.mp4", r"want semantic tokens, whole numbers \[n\]"),
    ],
)
def test_what_the_model_does_not_do_is_one_line(folder, tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    media.write_video("in.webp", video(9), fps=8)
    save_file({"tokens": np.zeros((2, 3, 8), np.float32)}, "t.safetensors")
    save_file({"semantic_tokens": np.zeros(8, np.int32)}, "s.safetensors")
    save_file({"semantic_tokens": np.zeros(9, np.float32)}, "f.safetensors")
    before = sorted(tmp_path.iterdir())
    line = line_of(capsys, *argv.split(), "--model", folder)
    assert re.search(words, line), line
    assert sorted(tmp_path.iterdir()) == before


def test_a_picture_can_be_the_first_frame(folder, tmp_path, capsys):
    Image.fromarray(video(1)[0]).save(tmp_path / "a.png")
    argv = ["generate", PROMPT, "--image", tmp_path / "a.png", "--model", folder]
    both = [*argv, "--video", "in.mp4", "--out", tmp_path / "x.mp4"]
    assert "not both" in line_of(capsys, *both)


@pytest.mark.parametrize("option", [["--motion-score", "1"], ["--offload"], ["--carry", "frames"]])
def test_other_kinds_refuse_its_options(tmp_path, capsys, option):
    other = str(pathlib.Path(__file__).parents[1] / "old_models" / "dicode")
    argv = ["generate", "a circle", *option, "--out", tmp_path / "out.mp4", "--model", other]
    assert f"is no LanDiff model; leave {option[0]} out" in line_of(capsys, *argv)
