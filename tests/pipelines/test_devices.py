"""Prompts and clips on eight devices, which tell each other nothing; LanDiff's parts on four."""

import pathlib
import subprocess
import sys

import pytest
import sharded_painting
import sharded_training


def run(*names):
    """What a process with eight devices finds."""
    argv = [sys.executable, pathlib.Path(sharded_painting.__file__), *names]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return sharded_training.read_report(done.stdout)


@pytest.fixture(scope="module")
def report():
    return run()


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


@pytest.mark.slow
@pytest.mark.multi_device
def test_a_part_that_is_split_computes_what_it_does_whole(report):
    assert report["part_split"] > 3
    assert report["part_error"] < 1e-5 < report["part_spread"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.multi_device
def test_parts_of_landiff_that_are_split_give_the_tokens_and_frames_of_whole_ones():
    found = run("landiff")
    assert found["devices"] == 8
    alone, split = found["tokens"]
    assert split == alone
    assert len(set(alone)) > 1
    assert found["shape"] == [1, 25, 16, 24, 3]
    assert found["level"] <= 1
    assert found["spread"] > 1
    assert min(found["split"].values()) > 0, "a part lies whole on every device"
