"""Long videos on the command line: what is there while they are painted, and after a stop."""

import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

import dicode_jax
from dicode_jax import cli
from dicode_jax.errors import UserError
from dicode_jax.media import video
from dicode_jax.pipelines import load
from dicode_jax.pipelines.painting import Clip
from dicode_jax.storage import hub


class Stub:
    """Paints flat clips; `between` is called with the number of each before it is painted."""

    config = types.SimpleNamespace(
        fps=8.0, frame_size=20, sampling=types.SimpleNamespace(num_frames=16)
    )

    def __init__(self, between):
        self.between = between

    def record(self, **told):
        return {}

    def stream(self, prompt, *, num_clips, **options):
        for index in range(num_clips):
            self.between(index)
            yield Clip(0, index, np.full((16, 20, 24, 3), 50 * (index % 5), np.uint8))


def use(between, patch=setattr):
    """Puts a stub where commands look for a pipeline."""
    patch(hub, "find_model", lambda name: name)
    patch(load, "pipeline_kind", lambda folder: "dicode")
    patch(dicode_jax, "load", lambda *_, **__: Stub(between))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(out, num_clips):
    return cli.main(["generate", "a red circle", "--out", out, "--num-clips", str(num_clips)])


def test_a_clip_is_in_the_file_before_the_next_is_painted(work, monkeypatch):
    sizes = []

    def look(index):
        sizes.append(os.path.getsize("a.part.mp4") if os.path.exists("a.part.mp4") else 0)

    use(look, monkeypatch.setattr)
    assert generate("a.mp4", 4) == 0
    assert sizes[0] == 0
    assert all(np.diff(sizes) > 200)
    assert os.listdir() == ["a.mp4"]


def test_a_model_that_fails_on_the_way_leaves_the_clips_before(work, monkeypatch, capsys):
    def fail(index):
        if index == 2:
            raise UserError("sample 0 came out as NaN")

    use(fail, monkeypatch.setattr)
    assert generate("a.gif", 5) == 2
    assert capsys.readouterr().err == (
        "dicode: error: sample 0 came out as NaN; the first 4 s are in a.part.gif; a.gif is not "
        "written\n"
    )
    assert os.listdir() == ["a.part.gif"]
    assert len(video.read_video("a.part.gif").frames) == 32


def wait(index):
    if index == 3:
        print("three", flush=True)
        time.sleep(60)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_clips_that_are_there_under_another_name(tmp_path, number, status):
    code = (
        "import signal, sys, test_streams as tests\n"
        # Children of a process in the background ignore Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "tests.use(tests.wait)\n"
        "sys.exit(tests.generate('a.mp4', 300))\n"
    )
    folders = [pathlib.Path(cli.__file__).parents[2], pathlib.Path(__file__).parent]
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "three\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err == "dicode: error: stopped; the first 6 s are in a.part.mp4; a.mp4 is not written\n"
    assert os.listdir(tmp_path) == ["a.part.mp4"]
    assert len(video.read_video(tmp_path / "a.part.mp4").frames) == 48
