"""What `pytest tests/parity` does with fixtures that no runner knows."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from parity import harness
from parity.runners import landiff_lm
from safetensors.numpy import save_file
from source_tree import ROOT

from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.language_model import LanguageModelConfig


def test_marks_in_front_of_frames_are_drawn_from_themselves_alone():
    frames = FrameTokens(iframe=2, pframe=1, segment=2)
    body = dataclasses.replace(landiff_lm.RELEASED_BODY, vocab_size=12)
    cfg = LanguageModelConfig(body=body, frames=frames, codebook_size=5)
    eos, start_i, start_p = 5, 7, 9  # of 0 I x x i P x p, I x x i P x p, I x x i
    wanted = {3: (start_p,), 6: (start_i,), 10: (start_p,), 13: (start_i,)}
    assert landiff_lm.allowed_at(cfg, 5) == wanted
    wanted |= {10: (start_p, eos), 13: (start_i, eos)}
    assert landiff_lm.allowed_at(cfg, 5, may_end=True) == wanted


@pytest.fixture
def golden(tmp_path):
    """A family that nobody knows, with a folder and a file, and one without fixtures."""
    folder = tmp_path / "nova" / "dit"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    np.savez(folder / "outputs.npz", a=np.zeros(2), b=np.zeros(3))
    save_file({"c": np.zeros(2)}, folder / "io.safetensors")
    save_file({"w": np.zeros(2)}, folder / "weights.safetensors")
    for name in ("one", "two"):
        meta = json.dumps({"kind": "schedule"})
        np.savez(tmp_path / "nova" / f"{name}.npz", meta=meta, a=np.zeros(2))
    np.savez(tmp_path / "nova" / "plain.npz", a=np.zeros(2))
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "README.md").touch()
    (tmp_path / ".git" / "x").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def gone(tmp_path):
    """A UNet of an option that is gone, and nothing else that could be compared."""
    config = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1}
    config |= {"attention_resolutions": [1], "num_head_channels": 8, "use_relative_position": True}
    (tmp_path / "dynamicrafter").mkdir()
    meta = json.dumps({"kind": "unet3d", "config": config, "cases": {}})
    np.savez(tmp_path / "dynamicrafter" / "unet_r.npz", meta=meta, a=np.zeros(2))
    return tmp_path


def test_a_fixture_of_an_option_that_is_gone_is_left_out_with_the_option(gone):
    done, left_out = run(gone, "asks for an option that is gone")
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 skipped" in done.stdout
    assert left_out == {
        "dynamicrafter/unet_r,": "the whole of it".ljust(35) + "use_relative_position = True"
    }


def run(golden, title="no runner knows it"):
    command = [sys.executable, "-m", "pytest", "tests/parity/test_golden.py", "-q"]
    command += ["-p", "no:cacheprovider", "--golden", str(golden)]
    env = {name: x for name, x in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    lines = done.stdout.split(f"left out, {title}", 1)[1].splitlines()
    return done, {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if "  " in line}


def test_a_family_without_runners_is_left_out_by_name(golden):
    done, left_out = run(golden)
    assert done.returncode == 0, done.stdout
    assert left_out == {
        "nova/dit": "1 fixture(s), 3 arrays",
        "nova/schedule": "2 fixture(s), 2 arrays",
        "nova/plain": "1 fixture(s), 1 arrays",
        "hollow": "an empty folder",
    }


def test_an_unknown_kind_of_a_family_with_runners_fails_by_name(golden):
    (golden / "dicode" / "dream").mkdir(parents=True)
    (golden / "dicode" / "dream" / "config.json").write_text("{}")
    np.savez(golden / "dicode" / "dream.npz", meta=json.dumps({"kind": "unet3d"}), a=np.zeros(2))
    done, left_out = run(golden)
    assert done.returncode == 1, done.stdout
    assert "2 failed" in done.stdout
    assert "no runner for 'dicode/dream'" in done.stdout
    assert left_out["dicode/dream"] == "1 fixture(s), 0 arrays"
    assert left_out["dicode/unet3d"] == "1 fixture(s), 1 arrays"  # of another family it has one


def test_the_readme_lists_the_fixtures_of_the_repository_and_how_much_they_hold():
    table = (ROOT / "README.md").read_text().split("## Conversion and parity")[1]
    rows = re.findall(r"^\| `(\w+/\w+)` \| [^|]+ \| (\d+) \| (\d+) \|", table, re.MULTILINE)
    held = {
        fixture.name: fixture.num_arrays
        for family in harness.families(ROOT / "tests/golden")
        for fixture in harness.find_fixtures(family)
    }
    assert {name: int(arrays) for name, arrays, _ in rows} == held
    total = sum(int(compared) for *_, compared in rows)
    assert f"{total:,} arrays" in table  # of which the text speaks
