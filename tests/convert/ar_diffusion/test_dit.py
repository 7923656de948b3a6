"""The denoiser's checkpoints at full size by shapes, and a tiny one there and back by values."""

import dataclasses
import json

import numpy as np
import pytest
from convert_names import read_manifest, shapes_only, state_dict
from flax import nnx

from convert import from_torch, to_torch
from convert.ar_diffusion import dit
from convert.engine.rules import ConversionError
from dicode_jax.errors import UserError
from dicode_jax.models.ar_diffusion.dit import Denoiser, DenoiserConfig, DiTConfig
from dicode_jax.storage import weights

FULL = {
    "uncond": (DenoiserConfig(null="zero"), 671_923_972, 589_824),
    "ucf101_class": (DenoiserConfig(num_classes=101, null="first"), 677_896_708, 589_824),
    "sky_rope": (
        DenoiserConfig(dit=DiTConfig(rotary=True, qk_norm=True), null="zero"),
        671_932_036,
        36,
    ),
}
TINY = DenoiserConfig(
    dit=DiTConfig(
        num_frames=16,
        num_tokens=2,
        channels=4,
        embed_dim=32,
        num_layers=2,
        num_heads=16,
        context_len=3,
        context_dim=5,
    ),
    null="zero",
)


def manifest(name):
    """Shapes, and the numbers of the noise, which are read."""
    made = shapes_only(read_manifest(f"ardiffusion_dit_{name}"))
    return made | {f"{dit.DIFFUSION}betas": DenoiserConfig().schedule.table("betas")}


@pytest.mark.parametrize("name", FULL)
def test_the_release_is_told_by_its_keys_consumed_and_filled(name):
    want, parameters, fixed = FULL[name]
    source = manifest(name)
    told = dit.find_config(source)
    assert told.config == want
    made = dit.KIND.plan(source, told.config)
    assert made.problems == []
    report = made.report()
    assert report["parameters"] == parameters
    assert report["used"] + len(report["skipped"]) == len(source)
    buffers = {k for k in made.skipped if "noise schedule" in made.skipped[k]}
    assert buffers == {dit.DIFFUSION + name for name in dit.BUFFERS}
    positions = [k for k in made.skipped if k not in buffers and ".blocks." not in k]
    assert sum(np.prod(source[k].shape) for k in positions) == fixed
    json.dumps(report)


def test_one_key_too_few_and_one_too_many_are_named():
    source = manifest("uncond")
    del source["diffusion_model.model.blocks.7.attn.qkv.bias"]
    source["diffusion_model.model.blocks.7.attn.q_norm.weight"] = source["context_emb"]
    problems = dit.KIND.plan(source, FULL["uncond"][0]).problems
    assert any("unfilled target: dit.blocks.7.attn.qkv.bias" in line for line in problems)
    assert any("q_norm" in line for line in problems)
    assert len(problems) == 2


def tiny(cfg, seed=0):
    """A denoiser and all that its original stores."""
    rng = np.random.default_rng(seed)
    model = Denoiser(cfg, rngs=nnx.Rngs(0))
    source = state_dict(model, dit.denoiser_rules(cfg))
    source = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in source.items()}
    return source | dit.stored_tables(cfg)


VARIANTS = {
    "uncond": TINY,
    "class": dataclasses.replace(TINY, num_classes=4, null="first"),
    "rope": dataclasses.replace(
        TINY,
        dit=dataclasses.replace(TINY.dit, embed_dim=64, rotary=True, qk_norm=True, num_tokens=32),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoint_comes_back_bit_for_bit(name, tmp_path):
    cfg = VARIANTS[name]
    source = tiny(cfg)
    assert dit.find_config(source).config == cfg
    model = from_torch("ar_diffusion_denoiser", source, cfg)
    weights.save_module(tmp_path / "denoiser", model, cfg)
    out = tmp_path / "back.safetensors"
    assert to_torch.main([str(tmp_path / "denoiser"), "--out", str(out)]) == 0
    from convert.engine.sources import open_source

    back = open_source(out)
    assert back.keys() == source.keys()
    for key, value in source.items():
        np.testing.assert_array_equal(back[key].numpy(), value)


def test_other_tables_than_the_models_are_named():
    source = tiny(TINY)
    source["diffusion_model.model.pos_embed"] = source["diffusion_model.model.pos_embed"] + 0.1
    source["diffusion_model.sqrt_alphas_cumprod"] = source["diffusion_model.alphas_cumprod"]
    with pytest.raises(ConversionError) as caught:
        from_torch("ar_diffusion_denoiser", source, TINY)
    assert len(caught.value.problems) == 2


def options(**changes):
    model = {"hidden_size": 32, "depth": 2, "causal_attn_mode": "temporal_causal"}
    target = changes.pop("target", "src.gen_model")
    return {
        "target": f"{target}.base.BaseModel",
        "params": {
            "norm_preprocess": True,
            "model_cfg": {"target": f"{target}.modules.dit_model.DiT_crossattn", "params": model},
            "diffusion_cfg": {
                "target": f"{target}.modules.diffusion.LatentDiffusion",
                "params": {"parameterization": "x0", "linear_start": 1e-4, "linear_end": 2e-2},
            },
        }
        | changes,
    }


def test_both_names_of_the_classes_are_read_and_others_are_not():
    first, second = (
        dit.denoiser_config(options(target=t)) for t in ("src.ardiff", "src.gen_model")
    )
    assert first == second
    assert first.schedule == DenoiserConfig().schedule
    assert (first.dit.embed_dim, first.dit.mask) == (32, "temporal_causal")
    with pytest.raises(ValueError, match=r"other\.base\.BaseModel"):
        dit.denoiser_config(options(target="other"))


@pytest.mark.parametrize(
    "change",
    [
        {"learn_sigma": True},
        {"merge_mode": "separate_norm"},
        {"patch_size": 2},
    ],
)
def test_options_of_no_released_model_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dit.dit_config({"hidden_size": 32} | change)


def test_a_checkpoint_of_another_model_is_refused():
    with pytest.raises(UserError, match="no denoiser of AR-Diffusion"):
        dit.find_config({"wte.weight": np.zeros((2, 2))})
