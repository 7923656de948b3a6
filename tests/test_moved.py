"""Old names of modules, for one release."""

import importlib
import pathlib
import subprocess
import sys

import pytest

import dicode_jax
from dicode_jax._moved import MOVED

ROOT = pathlib.Path(dicode_jax.__file__).parents[1]


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_gives_what_the_new_one_holds_and_says_where_it_is(old):
    new = importlib.import_module(f"dicode_jax.{MOVED[old]}")
    sys.modules.pop(f"dicode_jax.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"dicode_jax\.{old} has moved to {new.__name__}"):
        module = importlib.import_module(f"dicode_jax.{old}")
    public = [name for name in vars(new) if not name.startswith("_")]
    assert public
    assert all(getattr(module, name) is getattr(new, name) for name in public)


def test_a_documented_import_of_the_last_release_works_in_a_fresh_process():
    code = (
        "from dicode_jax.data.video import write_video\n"
        "from dicode_jax.models.dicode.stages.configs import ARTrainConfig\n"
        "from dicode_jax.models.dicode.stages.configs import AutoencoderTrainConfig\n"
        "from dicode_jax.data.sources import open_source\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "dicode_jax.data.video has moved to dicode_jax.media.video" in done.stderr
    assert "<string>:1: DeprecationWarning" in done.stderr  # it points at whoever imports


def test_an_unknown_module_is_still_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"dicode_jax\.data\.vide"):
        importlib.import_module("dicode_jax.data.vide")
