"""`dicode` with a model of LanDiff: prompts, videos and semantic tokens in and out."""

import pathlib
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_landiff_pipeline import make, video

from dicode_jax import cli
from dicode_jax.cli import landiff
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
    assert "the language model takes 0.00589 MB" in out
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


@pytest.mark.slow
@pytest.mark.long
def test_a_list_of_prompts_becomes_a_folder_of_videos(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\na blue cross\n")
    argv = ["generate", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "videos"]
    argv += ["--format", "webp", "--motion-score", 0.5, "--seed", 3, "--model", folder]
    assert cli.main([*map(str, argv)]) == 0
    made = sorted((tmp_path / "videos").glob("*.webp"))
    assert [len(media.read_video(path).frames) for path in made] == [17, 17]
    said = capsys.readouterr().out
    assert said.count("the language model takes at most ") == 1


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
        ("decode w.safetensors --guidance-scale 2 --out x.mp4", "is --diffusion-guidance-scale"),
        ("reconstruct in.webp --guidance-scale 2 --out x.mp4", "is --diffusion-guidance-scale"),
        (
            "decode w.safetensors --history-noise 1000 --out x.mp4",
            "want a whole number from 0 to 999",
        ),
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
    save_file({"semantic_tokens": np.zeros(9, np.int32)}, "w.safetensors")
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


def test_a_list_goes_on_from_the_ends_of_videos_of_any_length(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    media.write_video("in.webp", video(12), fps=8)
    (tmp_path / "list.csv").write_text(f"prompt,video\n{PROMPT},in.webp\n")
    argv = ["generate", "--prompts", "list.csv", "--out", "made", "--format", "webp"]
    assert cli.main([*argv, "--steps", "2", "--model", folder]) == 0
    (made,) = pathlib.Path("made").glob("*.webp")
    np.testing.assert_array_equal(media.read_video(made).frames[:9], video(12)[3:])


def test_a_video_longer_than_others_may_be_is_encoded_up_to_what_memory_holds(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.video, "MAX_FRAMES", 4)  # of other families
    media.write_video("in.webp", video(9), fps=8)
    argv = ["encode", "in.webp", "--out", "t.safetensors", "--model", folder]
    assert cli.main(argv) == 0
    assert "5 tokens of 9 frames" in capsys.readouterr().out
    monkeypatch.setattr(landiff, "FRAME_BYTES", 8 * 16 * 24 * 3)
    line = line_of(capsys, *argv)
    assert "in.webp has more than 8 frames at 8 a second" in line
    assert "cut it to 1 seconds" in line


@pytest.mark.parametrize("command", ["decode", "reconstruct"])
def test_other_kinds_have_no_frames_that_are_done(tmp_path, capsys, command):
    other = str(pathlib.Path(__file__).parents[1] / "old_models" / "dicode")
    save_file({"tokens": np.zeros((2, 3, 8), np.float32)}, tmp_path / "t.safetensors")
    media.write_video(tmp_path / "in.webp", video(9), fps=8)
    given = tmp_path / ("in.webp" if command == "reconstruct" else "t.safetensors")
    argv = [command, given, "--history-noise", 3, "--out", tmp_path / "x.mp4", "--model", other]
    assert "leave --history-noise out" in line_of(capsys, *argv)


@pytest.mark.parametrize("option", [["--motion-score", "1"], ["--offload"], ["--carry", "frames"]])
def test_other_kinds_refuse_its_options(tmp_path, capsys, option):
    other = str(pathlib.Path(__file__).parents[1] / "old_models" / "dicode")
    argv = ["generate", "a circle", *option, "--out", tmp_path / "out.mp4", "--model", other]
    assert f"is no LanDiff model; leave {option[0]} out" in line_of(capsys, *argv)
