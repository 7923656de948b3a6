"""`python -m convert ar_diffusion`: checkpoints in, a model folder out, strict both ways."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from convert_names import read_manifest, shapes_only, state_dict
from flax import nnx
from safetensors.numpy import save_file
from tiny_ar_diffusion import VAE

from convert import to_torch
from convert.ar_diffusion import command, discriminator, dit, vae
from convert.engine.plan import plan
from dicode_jax.models.ar_diffusion.dit import Denoiser, DenoiserConfig, DiTConfig
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE, FrameVAEConfig
from dicode_jax.models.lpips import LPIPS, LPIPSConfig
from dicode_jax.models.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from dicode_jax.nn.rngs import blank
from dicode_jax.pipelines.ar_diffusion import ARDiffusionPipeline
from dicode_jax.storage import weights

# Of widths that a checkpoint tells heads and groups by.
SIDE = dataclasses.replace(VAE.encoder, embed_dim=64, num_heads=1)
PIXELS = dataclasses.replace(VAE.pixel_decoder, channels=32, num_groups=32)
TINY = dataclasses.replace(VAE, encoder=SIDE, decoder=SIDE, pixel_decoder=PIXELS)
JUDGE = PatchDiscriminatorConfig(channels=4, num_layers=2)


def statistics(channels):
    return {
        "running_mean": np.zeros(channels, np.float32),
        "running_var": np.ones(channels, np.float32),
        "num_batches_tracked": np.asarray(3, np.int64),
    }


@pytest.fixture
def checkpoints(tmp_path):
    """An Accelerate folder of a VAE and the file of a loss."""
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    model = FrameVAE(TINY, rngs=nnx.Rngs(0))
    save_file(state_dict(model, vae.RULES), folder / "model.safetensors")
    judge = PatchDiscriminator(JUDGE, rngs=nnx.Rngs(1))
    loss = state_dict(judge, discriminator.rules({}, JUDGE), "discriminator.")
    for name, channels in (("3", 8), ("6", 16)):
        for key, value in statistics(channels).items():
            loss[f"discriminator.main.{name}.{key}"] = value
    loss["logvar"] = np.zeros((), np.float32)
    save_file(loss, tmp_path / "loss.safetensors")
    return folder, tmp_path / "loss.safetensors", model, judge


def test_a_folder_of_accelerate_and_a_loss_become_models_that_load(checkpoints, tmp_path):
    folder, loss, model, judge = checkpoints
    out = tmp_path / "out"
    args = ["--vae", str(folder), "--discriminator", str(loss), "--out", str(out)]
    assert command.main(args) == 0
    got, cfg = weights.load_module(out / "vae", FrameVAE, FrameVAEConfig)
    assert cfg == TINY
    other, cfg = weights.load_module(
        out / "discriminator", PatchDiscriminator, PatchDiscriminatorConfig
    )
    assert cfg == JUDGE
    for one, two in ((got, model), (other, judge)):
        named = weights.named_arrays(two)
        for path, array in weights.named_arrays(one).items():
            np.testing.assert_array_equal(array, named[path], err_msg=path)
    report = json.loads((out / "conversion.json").read_text())
    assert report["assumed"]["vae"]["encoder.num_heads"] == 1


def test_what_fits_nowhere_is_named_and_nothing_is_written(checkpoints, tmp_path, capsys):
    folder, _, model, _ = checkpoints
    tensors = state_dict(model, vae.RULES) | {"decoder.surplus": np.zeros(2, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    assert command.main(["--vae", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "unused source key: decoder.surplus" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert "name a checkpoint as SOURCE" in capsys.readouterr().err


def test_the_discriminator_of_the_release_is_consumed_and_filled():
    source = shapes_only(read_manifest("ar_diffusion_discriminator"))
    parts, stray = command.plan_loss(source)
    made = parts["discriminator"]
    assert made.config == PatchDiscriminatorConfig()
    assert made.plan.problems == stray == []
    assert made.plan.report()["parameters"] == 2_765_633
    assert len(made.plan.skipped) == 9


def lpips_names(slices):
    """Keys of taming's LPIPS, or of torchvision's VGG-16 beside its heads, with shapes."""
    out, width = {}, 3
    places = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    for i, (block, widths) in enumerate(zip(places, LPIPSConfig().widths, strict=True)):
        for place, channels in zip(block, widths, strict=True):
            name = f"net.slice{i + 1}.{place}" if slices else f"features.{place}"
            out |= {f"{name}.weight": (channels, width, 3, 3), f"{name}.bias": (channels,)}
            width = channels
        out[f"lin{i}.model.1.weight"] = (1, width, 1, 1)
    return {name: jnp.broadcast_to(jnp.float32(0), shape) for name, shape in out.items()}


@pytest.mark.parametrize("slices", [True, False])
def test_both_namings_of_lpips_fill_it(slices):
    rules = discriminator.LPIPS_RULES if slices else discriminator.TORCHVISION_RULES
    made = plan(lpips_names(slices), rules, blank(LPIPS))
    assert made.problems == []
    assert len(made.parts) == 13 * 2 + 5


SMALL = DenoiserConfig(
    dit=DiTConfig(num_tokens=3, embed_dim=32, num_layers=1, context_len=3, context_dim=5),
    null="zero",
)
YAML = """
model:
  target: src.gen_model.base.BaseModel
  params:
    noise_level: ar_diff_midsamplet
    norm_preprocess: true
    model_cfg:
      target: src.gen_model.modules.dit_model.DiT_crossattn
      params: {num_frames: 16, n_token_per_frame: 3, in_channels: 4, hidden_size: 32, depth: 1,
               num_heads: 8, context_dim: 5, context_token: 3, causal_attn_mode: temporal_causal}
    diffusion_cfg:
      target: src.gen_model.modules.diffusion.LatentDiffusion
      params: {parameterization: v, linear_start: 0.0001, linear_end: 0.02, clip_denoised: true}
"""


@pytest.fixture
def denoiser(tmp_path):
    """An Accelerate folder of a denoiser with all that its original stores."""
    folder = tmp_path / "checkpoint-9"
    folder.mkdir()
    model = Denoiser(SMALL, rngs=nnx.Rngs(2))
    source = state_dict(model, dit.denoiser_rules(SMALL)) | dit.stored_tables(SMALL)
    save_file(source, folder / "model.safetensors")
    return folder, source


def test_vae_and_denoiser_become_a_model_that_loads(checkpoints, denoiser, tmp_path):
    args = ["--vae", str(checkpoints[0]), "--dit", str(denoiser[0]), "--out", str(tmp_path / "m")]
    assert command.main(args) == 0
    pipe = ARDiffusionPipeline.from_pretrained(tmp_path / "m")
    assert (pipe.parts["denoiser"].cfg, pipe.parts["vae"].cfg) == (SMALL, TINY)
    np.testing.assert_array_equal(pipe.parts["denoiser"].context[...], denoiser[1]["context_emb"])
    assert pipe.config.sampling.num_frames == 16
    report = json.loads((tmp_path / "m" / "conversion.json").read_text())
    skipped = report["parts"]["denoiser"]["skipped"]
    assert "noise schedule" in skipped["diffusion_model.betas"]
    assert report["assumed"]["denoiser"]["mask"] == "video_temporal_causal"


def test_a_yaml_says_what_the_weights_do_not_and_may_not_contradict_them(
    denoiser, tmp_path, capsys
):
    yaml = tmp_path / "model.yaml"
    yaml.write_text(YAML)
    args = ["--dit", str(denoiser[0]), "--config", str(yaml), "--overwrite"]
    assert command.main([*args, "--out", str(tmp_path / "d")]) == 0
    _, cfg = weights.load_module(tmp_path / "d/denoiser", Denoiser, DenoiserConfig)
    other = dataclasses.replace(SMALL.dit, num_heads=8, mask="temporal_causal")
    assert (cfg.dit, cfg.schedule.parameterization) == (other, "v")
    assert not (tmp_path / "d/config.json").exists()  # no pipeline without a VAE
    wrong = {
        "depth: 1": ("depth: 2", r"dit.num_layers: 1 by the weights, 2 by"),
        "0.02": ("0.012", "schedule.linear_end: 0.02 by the weights, 0.012 by"),
        "noise_level: ar_diff_midsamplet": ("condition_mode: class_cond", "no 'num_class'"),
        "src.gen_model.base": ("src.gen_model.base", None),
        "num_heads: 8": ("num_heads: [8]", "is no configuration of AR-Diffusion"),
        "depth: 1,": ("depth: 1, learn_sigma: true,", "learn_sigma is not supported"),
    }
    for old, (new, message) in wrong.items():
        yaml.write_text(YAML.replace(old, new))
        status = command.main([*args, "--out", str(tmp_path / "e")])
        error = capsys.readouterr().err
        assert (status == 0) == (message is None), (new, error)
        assert message is None or (message in error and error.count("\n") == 1), error


def test_parts_that_do_not_fit_and_tables_that_are_others_are_named(
    checkpoints, denoiser, tmp_path, capsys
):
    folder, source = denoiser
    out = ["--out", str(tmp_path / "out")]
    beside = source | {"diffusion_model.betas": source["diffusion_model.alphas_cumprod"]}
    beside["diffusion_model.betas"] = np.linspace(1e-4, 2e-2, 1000).astype(np.float32)
    save_file(beside, folder / "model.safetensors")
    assert command.main(["--dit", str(folder), *out]) == 2
    assert "the noise schedule in the checkpoint is another one" in capsys.readouterr().err
    wide = dataclasses.replace(SMALL, dit=dataclasses.replace(SMALL.dit, num_tokens=4))
    model = Denoiser(wide, rngs=nnx.Rngs(2))
    other = state_dict(model, dit.denoiser_rules(wide)) | dit.stored_tables(wide)
    save_file(other, folder / "model.safetensors")
    assert command.main(["--vae", str(checkpoints[0]), "--dit", str(folder), *out]) == 2
    assert "the denoiser makes 4 tokens of 4 numbers for a frame" in capsys.readouterr().err
    for args, message in (
        (["--config", "a.yaml"], "nothing to convert"),
        (["--dit", str(folder), "--vae-config", "a.yaml"], "--vae-config is of --vae"),
        (["--lpips", "vgg.pth"], "give both --vgg and --lpips"),
    ):
        assert command.main([*args, *out]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_lpips_is_made_of_vgg_16_and_the_heads_and_goes_back(tmp_path, monkeypatch, checkpoints):
    config = LPIPSConfig(widths=((2, 2), (3, 3), (2, 2, 2), (3, 3, 3), (2, 2, 2)))
    monkeypatch.setattr(
        discriminator, "LPIPSConfig", functools.partial(LPIPSConfig, **vars(config))
    )
    model = LPIPS(config, rngs=nnx.Rngs(4))
    names = state_dict(model, discriminator.TORCHVISION_RULES)
    heads = {k: v for k, v in names.items() if k.startswith("lin")}
    vgg = {k: v for k, v in names.items() if k not in heads}
    save_file(vgg | {"classifier.0.bias": np.zeros(2, np.float32)}, tmp_path / "vgg16.safetensors")
    save_file(heads, tmp_path / "vgg.safetensors")
    args = ["--vgg", str(tmp_path / "vgg16.safetensors"), "--out", str(tmp_path / "l")]
    loss = ["--discriminator", str(checkpoints[1])]
    assert command.main([*args, *loss, "--lpips", str(tmp_path / "vgg.safetensors")]) == 0
    got, _ = weights.load_module(tmp_path / "l/lpips", LPIPS, LPIPSConfig)
    for path, array in weights.named_arrays(got).items():
        np.testing.assert_array_equal(array, weights.named_arrays(model)[path], err_msg=path)
    out = ["--out", str(tmp_path / "back.safetensors"), "--overwrite"]
    for dtype in ("float16", "float32"):  # a count stays one
        assert to_torch.main([str(tmp_path / "l"), *out, "--dtype", dtype]) == 0
    again = ["--discriminator", str(tmp_path / "back.safetensors"), "--out", str(tmp_path / "m")]
    assert command.main(again) == 0
    for part in ("lpips", "discriminator"):
        one, two = (weights.read_arrays(tmp_path / x / part / "model.safetensors") for x in "lm")
        assert one.keys() == two.keys()
        assert all((one[k] == two[k]).all() for k in one)
    back = weights.read_arrays(tmp_path / "back.safetensors")
    assert back["perceptual_loss.scaling_layer.shift"].shape == (1, 3, 1, 1)
    assert back["discriminator.main.3.running_var"].tolist() == [1.0] * 8
