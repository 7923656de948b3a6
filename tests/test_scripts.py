"""The small tools that `make demo` uses, run as it runs them."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dicode_jax.data import shapes_world as synthetic
from dicode_jax.media.video import read_video, write_video

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
