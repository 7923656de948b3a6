"""Divot's de-tokenizer: the full-size key list by shapes, and a tiny file end to end."""

import dataclasses
import shutil

import numpy as np
import pytest
from convert_names import read_manifest, shapes_only, state_dict
from safetensors.numpy import load_file, save_file
from tiny import random_module, with_value

from convert import divot as command
from dicode_jax import cli
from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import PERSISTENT_BUFFERS
from dicode_jax.errors import UserError
from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.models.unet3d import UNet3DConfig
from dicode_jax.nn.resampler import ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.pipelines.divot import PARTS, DivotConfig, DivotDetokenizer
from dicode_jax.storage import weights

TINY = {
    "unet": UNet3DConfig(
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(1,),
        head_dim=8,
        context_dim=16,
        context_rule="length",
    ),
    "autoencoder": AutoencoderKLConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1),
    "resampler": ResamplerConfig(
        dim=24, depth=1, num_heads=1, num_queries=80, embed_dim=12, output_dim=16
    ),
}


def test_every_key_is_used_and_every_target_filled():
    manifest = read_manifest("divot_detokenizer")
    source = shapes_only(manifest["tensors"])
    configs = {name: found.config for name, found in command.find_configs(source).items()}
    assert configs["unet"] == UNet3DConfig(context_rule="length")
    assert configs["resampler"].num_queries == 125
    assert (configs["resampler"].depth, configs["resampler"].num_heads) == (6, 16)
    plans = command.plan_parts(source, configs)
    assert command.problems(source, plans) == []
    for name, prefix in command.PREFIXES.items():
        report = plans[name].report()
        assert report["parameters"] == manifest["param_counts"][prefix]
        assert report["used"] == report["source_keys"]


@pytest.fixture(scope="module")
def parts():
    return {
        name: random_module(lambda kind=kind, name=name: kind(TINY[name], rngs=ShapeRngs()))
        for name, (kind, _) in PARTS.items()
    }


@pytest.fixture(scope="module")
def checkpoint(parts):
    schedule = DivotConfig().schedule
    out = {key: np.asarray(schedule.table(key), np.float32) for key in PERSISTENT_BUFFERS}
    tables = {
        "unet": command.unet3d.rules(),
        "autoencoder": command.autoencoder_kl.RULES,
        "resampler": command.resampler.RULES,
    }
    for name, module in parts.items():
        out |= state_dict(module, tables[name], command.PREFIXES[name])
    return out


def run(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return command.main([str(folder / "model.safetensors"), "--out", str(folder / "out")])


@pytest.fixture(scope="module")
def converted(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("divot")
    extra = {"video_tokenizer.x.weight": np.zeros((2, 3), np.float32)}
    assert run(folder, checkpoint | extra) == 0
    return folder / "out"


def test_a_checkpoint_becomes_a_decoder_bit_for_bit(converted, parts, capsys):
    for name, module in parts.items():
        arrays = weights.read_arrays(converted / name / "model.safetensors")
        for path, array in weights.named_arrays(module).items():
            np.testing.assert_array_equal(arrays[path], array, path)
    assert cli.main(["info", str(converted)]) == 0
    out = capsys.readouterr().out
    assert "academic purpose" in out
    assert "model.safetensors" in out


def test_what_does_not_fit_is_one_line(tmp_path, checkpoint, capsys):
    key = "diffusion_model.out.2.bias"
    cases = (
        ({"a.b": np.zeros(2, np.float32)}, "no de-tokenizer of Divot"),
        ({k: v for k, v in checkpoint.items() if k != key}, "unfilled target: conv_out.bias"),
        (checkpoint | {"more": np.zeros(2, np.float32)}, "unused source key: more"),
        (checkpoint | {"betas": np.zeros(1000, np.float32)}, "noise schedule"),
    )
    for tensors, message in cases:
        assert run(tmp_path, tensors) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_features_and_options_are_checked(converted):
    decoder = DivotDetokenizer.from_pretrained(converted)
    assert decoder.config.sampling.table_dtype == "float16"
    features = np.zeros((2, 5, 12), np.float32)
    for options, message in (
        ({}, "null_features"),
        ({"null_features": features[0, :2]}, "want"),
        ({"num_inference_steps": 0, "guidance_scale": 1}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale: .* got nan"),
        ({"eta": "1", "guidance_scale": 1}, "eta: .* got '1'"),
        ({"sampler": "euler", "guidance_scale": 1}, "sampler: want ddim or .* got 'euler'"),
        ({"seed": 2**32, "guidance_scale": 1}, "seed: "),
        ({"seed": [1], "guidance_scale": 1}, "seed: 1 seeds for 2"),
        ({"null_features": np.full((5, 12), np.nan)}, "null_features .* NaN or infinite"),
    ):
        with pytest.raises(UserError, match=message):
            decoder(features, **options)
    for wrong in (features[..., :3], features[:, :0], features[:0], features[None], features[0, 0]):
        with pytest.raises(UserError, match=r"features are \[l, 12\] or a batch, got shape"):
            decoder(wrong, guidance_scale=1)
    for wrong in (np.full((5, 12), np.inf), "features", [[1.0], [1.0, 2.0]]):
        with pytest.raises(UserError, match=r"features are \[l, 12\] or a batch, got"):
            decoder(wrong, guidance_scale=1)


@pytest.mark.parametrize("part", list(PARTS))
def test_weights_that_are_no_numbers_are_refused_at_load(converted, tmp_path, part):
    shutil.copytree(converted, tmp_path / "model")
    path = tmp_path / "model" / part / "model.safetensors"
    arrays = load_file(path)
    name = max(arrays)
    save_file(arrays | {name: np.full_like(arrays[name], np.nan)}, path)
    with pytest.raises(UserError, match=f"weights of {part} hold NaN or infinite numbers .{name}"):
        DivotDetokenizer.from_pretrained(tmp_path / "model")


@pytest.mark.long
def test_a_clip_comes_from_its_own_features():
    unet = dataclasses.replace(
        TINY["unet"],
        model_channels=8,
        num_groups=4,
        temporal_attention=False,
        temporal_conv=False,
        init_attention=False,
    )
    autoencoder = AutoencoderKLConfig(
        channels=8, channel_mult=(1, 2), num_res_blocks=1, num_groups=4, mid_attention=False
    )
    configs = TINY | {"unet": unet, "autoencoder": autoencoder}
    parts = {
        name: random_module(lambda kind=kind, name=name: kind(configs[name], rngs=ShapeRngs()))
        for name, (kind, _) in PARTS.items()
    }
    strong = {"guidance_scale": 100.0, "guidance_rescale": 0.0}  # so that it shows in uint8
    sampling = SamplingConfig(num_frames=2, num_inference_steps=1, **strong)
    decoder = DivotDetokenizer(parts, config=DivotConfig(frame_size=(4, 8), sampling=sampling))
    rng = np.random.default_rng(0)
    null, features, others = (rng.normal(scale=10.0, size=(2, 5, 12)) for _ in range(3))
    paint = lambda *args, **options: np.asarray(decoder(*args, **options))  # noqa: E731
    video = paint(features, null_features=null[0], seed=1)
    assert video.shape == (2, 2, 4, 8, 3)
    mixed = paint(np.stack([features[0], others[1]]), null_features=null[0], seed=1)
    np.testing.assert_array_equal(mixed[0], video[0])
    assert (mixed[1] != video[1]).any()
    alone = paint(features[0], null_features=null[0], seed=2).astype(int)
    both = paint(np.stack([others[1], features[0]]), null_features=null[0], seed=1)
    assert np.abs(alone[0] - both[1]).max() <= 1
    assert (alone != video).any()
    options = {"null_features": null[0], "num_inference_steps": 3, "eta": 0.0}
    assert (paint(features[0], sampler="dpm++", **options) != paint(features[0], **options)).any()
    for part in PARTS:
        bad = DivotDetokenizer(
            parts | {part: with_value(parts[part], np.nan)}, config=decoder.config
        )
        with pytest.raises(UserError, match="no picture: look at the weights of unet"):
            bad(features[0], null_features=null[0])
