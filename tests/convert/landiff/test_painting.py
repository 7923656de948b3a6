"""LanDiff's denoiser and autoencoder: full size by shapes, tiny ones there and back by values."""

import dataclasses
import json

import numpy as np
import pytest
from convert_names import read_manifest, shapes_only
from flax import nnx
from tiny_landiff import TINY, TINY_VAE

from convert import from_torch, to_torch
from convert.engine.plan import flat_shapes
from convert.engine.rules import original_names
from convert.engine.sources import open_source
from convert.landiff import dit, vae
from dicode_jax.errors import UserError
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D, AutoencoderCausal3DConfig
from dicode_jax.models.landiff.dit import Denoiser, DenoiserConfig
from dicode_jax.nn.rngs import blank
from dicode_jax.storage import weights


@pytest.fixture(scope="module")
def released():
    """The keys of both files of the denoiser, as one model's."""
    main, control = (shapes_only(read_manifest(f"landiff_dit_{x}")) for x in ("main", "control"))
    assert (len(main), len(control)) == (557, 404)
    return main, control, dit.join(main, control)


def test_the_released_denoiser_is_told_by_its_keys_consumed_and_filled(released):
    _, _, source = released
    told = dit.find_config(source)
    assert told.config == DenoiserConfig()
    made = dit.KIND.plan(source, told.config)
    assert made.problems == []
    assert set(made.skipped) == {
        f"{dit.CONTROL}transformer.final_layernorm.{name}" for name in ("weight", "bias")
    }
    report = made.report()
    assert report["used"] == len(source) - 2 == 959
    assert report["parameters"] == 1_727_913_792 + 979_141_968 - 2 * 1920
    json.dumps(told.assumed)


def test_main_keys_and_a_tokenizer_in_the_second_file_do_not_disturb(released):
    main, _, source = released
    again = {"model." + key: value for key, value in source.items()}
    again[f"model.{dit.CONTROL}{dit.TOKENIZER}mean"] = source[f"{dit.CONTROL}time_embed.0.bias"]
    joined = dit.join(main, again)
    assert joined.keys() - source.keys() == {f"{dit.CONTROL}{dit.TOKENIZER}mean"}
    assert all(joined[key] is value for key, value in source.items() if key.startswith(dit.MAIN))
    assert dit.join({}, again).keys() == joined.keys()


@pytest.mark.parametrize("file", ["main", "control"])
def test_the_rest_of_the_engine_in_either_file_is_left_out_and_told(released, file):
    main, control, source = released
    beside = {
        *("first_stage_model.encoder.conv_in.conv.weight", "denoiser.sigmas"),
        *("conditioner.embedders.0.transformer.shared.weight", "loss_fn.sigma_sampler.sigmas"),
    }
    files = {"main": dict(main), "control": dict(control)}
    files[file] |= dict.fromkeys(beside, source[f"{dit.CONTROL}time_embed.0.bias"])
    files[file]["model.first_stage_model.x"] = files[file]["denoiser.sigmas"]
    joined = dit.join(files["main"], files["control"])
    made = dit.KIND.plan(joined, dit.find_config(joined).config)
    assert made.problems == []
    told = {name for name, why in made.skipped.items() if "beside the transformer" in why}
    assert beside < told == joined.keys() - source.keys()
    base = dit.BASE.plan(files["main"], dit.find_config(joined).config.dit)
    assert base.problems == []


def test_one_key_too_few_and_one_too_many_are_named(released):
    source = dict(released[2])
    del source[f"{dit.MAIN}transformer.layers.20.attention.dense.bias"]
    source[f"{dit.MAIN}transformer.layers.30.attention.dense.bias"] = source[
        f"{dit.MAIN}time_embed.0.bias"
    ]
    problems = dit.KIND.plan(source, DenoiserConfig()).problems
    assert len(problems) == 2
    assert any("unfilled target: dit.upper_blocks.5.attn.out.bias" in line for line in problems)
    assert any("unused source key" in line and "layers.30." in line for line in problems)


def test_the_released_autoencoder_is_told_by_its_keys_consumed_and_filled():
    source = shapes_only(read_manifest("landiff_vae"))
    told = vae.find_config(source)
    assert told.config == AutoencoderCausal3DConfig()
    made = vae.KIND.plan(source, told.config)
    assert (made.problems, made.skipped) == ([], {})
    assert made.report()["used"] == len(source) == 436
    assert made.report()["parameters"] == 215_583_907


def test_another_checkpoint_is_refused_in_one_line(released):
    with pytest.raises(UserError, match="no autoencoder of CogVideoX"):
        vae.find_config(released[2])
    with pytest.raises(UserError, match="lack LanDiff's control branch"):
        dit.find_config(dit.join(released[0], {}))
    short = dict(released[2])
    name = f"{dit.MAIN}mixins.pos_embed.pos_embedding"
    short[name] = short[f"{dit.MAIN}mixins.patch_embed.text_proj.weight"]
    with pytest.raises(UserError, match="want 3 axes"):
        dit.find_config(short)


STACKED = dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, scan_layers=True))
CASES = {
    "denoiser": ("landiff_denoiser", Denoiser, TINY),
    "stacked": ("landiff_denoiser", Denoiser, STACKED),
    "autoencoder": ("autoencoder_causal3d", AutoencoderCausal3D, TINY_VAE),
}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_comes_back_bit_for_bit(name, tmp_path):
    kind, build, cfg = CASES[name]
    rules = dit.rules(cfg) if kind == "landiff_denoiser" else vae.RULES
    rng, source = np.random.default_rng(0), {}
    loop = blank(build, TINY if name == "stacked" else cfg)
    for path, shape in flat_shapes(nnx.state(loop)).items():
        key, rule = next(original_names(rules, path))
        drawn = rng.normal(size=shape).astype(np.float32)
        source[key] = np.array(rule.layout.inverse(drawn), order="C")
    model = from_torch(kind, source, cfg)
    weights.save_module(tmp_path / "ours", model, cfg)
    out = tmp_path / "back.safetensors"
    assert to_torch.main([str(tmp_path / "ours"), "--out", str(out)]) == 0
    back = open_source(out)
    if kind == "landiff_denoiser":
        extra = dit.unused_norm(cfg)
        assert back.keys() - extra.keys() == {"model." + key for key in source}
        back = dit.join({}, back)
    for key, value in source.items():
        np.testing.assert_array_equal(back[key].numpy(), value, err_msg=key)
