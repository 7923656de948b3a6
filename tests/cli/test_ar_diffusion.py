"""`dicode generate` with an AR-Diffusion model: frames of one video, one after the other."""

import pathlib

import numpy as np
import pytest
from PIL import Image
from tiny_ar_diffusion import make

from dicode_jax import cli
from dicode_jax.media import video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    make().save_pretrained(path)
    return path


def test_a_video_is_written_frame_by_frame(folder, tmp_path, capsys):
    out = tmp_path / "out.gif"
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path / "first.png")
    arguments = ["--lag", "3", "--num-frames", "4", "--history-noise", "50", "--dtype", "float32"]
    arguments += ["--image", str(tmp_path / "first.png"), "--model", str(folder)]
    arguments += ["--sheet", str(tmp_path / "sheet.png")]
    assert cli.main(["generate", "Basketball", "--out", str(out), *arguments]) == 0
    probed = video.probe(out)
    assert "4 frames of 8 x 8" in capsys.readouterr().out
    assert (probed.width, probed.height) == (8, 8)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 2 * sheet.height  # four frames of a window in one row


def test_info_says_what_it_makes(folder, capsys):
    assert cli.main(["info", str(folder)]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["kind"] == "ar_diffusion"
    assert told["video"] == "5 frames of 8 x 8 at 25 a second"
    assert told["frame"] == "3 tokens of 4 numbers"
    assert told["window"] == "4 frames"
    assert told["classes"] == "3: Archery, Basketball, Crawling"
    assert told["sampling"] == "6 steps, lag 2, guidance 2"


def test_a_video_is_gone_on_from(folder, tmp_path):
    first = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3)).astype(np.uint8)
    video.write_video(tmp_path / "first.webp", first, fps=25)
    arguments = [
        "--video",
        str(tmp_path / "first.webp"),
        "--num-frames",
        "4",
        "--model",
        str(folder),
    ]
    out = tmp_path / "out.webp"
    assert cli.main(["generate", "0", "--out", str(out), "--dtype", "float32", *arguments]) == 0
    made = video.read_video(out)
    assert len(made.frames) == 4
    np.testing.assert_array_equal(made.frames[:3], first)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Diving"], "a prompt is the number of a class"),
        (["3"], "from 0 to 2"),
        (["0", "--num-frames", "1000001"], "from 1 to 1000000"),
        (["0", "--video", "nothing.mp4"], "nothing.mp4"),
        (["0", "--num-clips", "2"], "--num-clips and --clips-per-batch out"),
        (["0", "--clips-per-batch", "2"], "--num-clips and --clips-per-batch out"),
        (
            ["0", "--video", "a.mp4", "--image", "b.png"],
            "--image or --video to go on from, not both",
        ),
        (
            ["0", "--quality", "draft"],
            "--guidance-scale and --guidance-interval alone",
        ),
        (["0", "--lag", "1"], "lag 2 at least"),
    ],
)
def test_what_the_model_does_not_do_is_said_in_a_line(folder, tmp_path, capsys, arguments, words):
    out = tmp_path / "out.mp4"
    assert cli.main(["generate", *arguments, "--out", str(out), "--model", str(folder)]) != 0
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize("option", [["--lag", "1"], ["--history-noise", "1"]])
def test_other_kinds_refuse_its_options(tmp_path, capsys, option):
    other = str(pathlib.Path(__file__).parents[1] / "old_models" / "dicode")
    out = ["--out", str(tmp_path / "out.mp4"), "--model", other]
    assert cli.main(["generate", "a circle", *option, *out]) == 2
    assert f"leave {option[0]} out" in capsys.readouterr().err
