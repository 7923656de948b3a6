"""The picker, from what model folders say of themselves."""

import pytest

from dicode_jax import config as config_lib
from dicode_jax.app.models import describe, installed
from dicode_jax.errors import UserError
from dicode_jax.pipelines.ar_diffusion import ARDiffusionConfig, FrameSamplingConfig
from dicode_jax.pipelines.divot import DivotConfig
from dicode_jax.pipelines.dynamicrafter import DynamiCrafterConfig
from dicode_jax.pipelines.landiff_config import LanDiffConfig
from dicode_jax.storage import hub, packaged


def folder_of(config, folder):
    folder.mkdir()
    config_lib.to_json(config, folder / "config.json")
    return folder


def test_the_packaged_models_are_there_the_default_one_first():
    models = installed()
    assert set(models) == set(packaged.models())
    assert next(iter(models)) == hub.DEFAULT_MODEL
    shapes = models["shapes"]
    assert shapes.has_clips
    assert shapes.has_presets
    assert shapes.is_batched
    assert (shapes.num_frames, shapes.fps) == (16, 8.0)
    assert "a red circle moves right on a black background" in shapes.examples


def test_a_model_that_is_named_comes_first_without_its_path(tmp_path):
    folder = folder_of(ARDiffusionConfig(), tmp_path / "mine")
    models = installed(str(folder), "shapes")
    assert list(models)[:2] == ["mine", "shapes"]
    assert len(models) == len(packaged.models()) + 1  # shapes not twice
    assert models["mine"].folder == folder


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "other").mkdir()
    folders = [tmp_path / "mine", tmp_path / "other" / "mine"]
    for folder in folders:
        folder_of(ARDiffusionConfig(), folder)
    assert list(installed(*map(str, folders)))[:2] == ["mine", "mine (2)"]


def test_each_family_says_what_its_calls_take(tmp_path):
    sampling = FrameSamplingConfig(num_frames=12)
    config = ARDiffusionConfig(class_names=("Archery", "Basketball"), sampling=sampling)
    classes = describe("a", folder_of(config, tmp_path / "a"))
    assert classes.examples == ("Archery", "Basketball")
    assert not classes.has_clips
    assert classes.has_frames
    assert classes.num_frames == 12
    assert not classes.has_presets
    images = describe("b", folder_of(DynamiCrafterConfig(), tmp_path / "b"))
    assert {"image", "last_image"} <= images.takes
    assert images.has_presets
    assert not images.has_clips
    long = describe("c", folder_of(LanDiffConfig(), tmp_path / "c"))
    assert long.has_clips
    assert not long.has_presets
    assert not long.is_batched


def test_a_model_without_prompts_is_refused(tmp_path):
    folder = folder_of(DivotConfig(), tmp_path / "features")
    with pytest.raises(UserError, match="features paints no prompts"):
        installed(str(folder))


def test_a_name_that_is_nothing_is_an_error(tmp_path):
    with pytest.raises(UserError):
        installed(str(tmp_path / "missing"))
