"""`python -m convert ar_diffusion`: checkpoints in, a model folder out, strict both ways."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from convert_names import read_manifest, shapes_only, state_dict
from flax import nnx
from safetensors.numpy import save_file

from convert.ar_diffusion import command, discriminator, vae
from convert.engine.plan import plan
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE, FrameVAEConfig
from dicode_jax.models.lpips import LPIPS, LPIPSConfig
from dicode_jax.models.maskgit_decoder import MaskGITDecoderConfig
from dicode_jax.models.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from dicode_jax.models.query_tokenizer import QueryTransformerConfig
from dicode_jax.nn.rngs import blank
from dicode_jax.storage import weights

SIDE = QueryTransformerConfig(patch_size=2, embed_dim=64, num_layers=1, num_heads=1)
TINY = FrameVAEConfig(
    image_size=4,
    num_tokens=3,
    token_dim=2,
    codebook_size=5,
    encoder=SIDE,
    decoder=SIDE,
    pixel_decoder=MaskGITDecoderConfig(
        z_channels=6, channels=32, channel_mult=(1, 2), num_res_blocks=1
    ),
)
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
