"""Prompts and clips on eight devices, which tell each other nothing."""

import pathlib
import subprocess
import sys

import pytest
import sharded_painting
import sharded_training


@pytest.fixture(scope="module")
def report():
    run = [sys.executable, pathlib.Path(sharded_painting.__file__)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return sharded_training.read_report(done.stdout)


@pytest.mark.slow
@pytest.mark.multi_device
def test_eight_devices_give_the_tokens_and_frames_of_one(report):
    assert report["devices"] == 8
    assert report["equal_tokens"]
    assert report["equal_alone"]
    assert max(report["levels"]) <= 1
    assert min(report["spread"]) > 1
    assert report["between"] > 1  # UniPC, guidance on a part of the steps and kept deep features
    assert report["rolled_levels"] <= 1
    assert report["rolled_shape"] == [9, 6, 8, 8, 3]


@pytest.mark.slow
@pytest.mark.multi_device
def test_no_program_that_generates_or_denoises_sends_anything_between_devices(report):
    assert report["partitions"] == dict.fromkeys(
        ["_begin", "_go_on", "PIXELS ddim", "PIXELS unipc", "_advance"], 8
    )
    assert report["without_loop"] == []
    assert report["collectives"] == []
