"""AR-Diffusion's VAEs at full size, by shapes alone: every key used, every target filled."""

import math

import pytest
from convert_names import read_manifest, shapes_only

from convert.ar_diffusion import vae
from convert.engine.plan import plan
from dicode_jax.errors import UserError
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE, FrameVAEConfig
from dicode_jax.models.query_tokenizer import QueryTransformerConfig
from dicode_jax.nn.rngs import blank

FILES = {
    "ar_diffusion_vae": (692, 640_993_547, FrameVAEConfig()),
    "ar_diffusion_vae_time": (1076, 842_713_355, FrameVAEConfig(temporal=True)),
}


@pytest.mark.parametrize("name", FILES)
def test_the_release_is_found_consumed_and_filled(name):
    num_keys, num_parameters, config = FILES[name]
    source = shapes_only(read_manifest(name))
    told = vae.find_config(source)
    assert told.config == config
    assert told.assumed["encoder.num_heads"] == 16
    made = vae.KIND.plan(source, told.config)
    assert made.problems == []
    assert made.skipped == {}
    assert len(source) == num_keys == made.report()["used"]
    assert made.report()["parameters"] == num_parameters
    assert sum(math.prod(x.shape) for x in source.values()) == num_parameters


def test_one_missing_key_is_named():
    source = shapes_only(read_manifest("ar_diffusion_vae"))
    key = "pixel_decoder.up.3.block.0.nin_shortcut.weight"
    del source[key]
    (line,) = plan(source, vae.RULES, blank(FrameVAE, FrameVAEConfig())).problems
    assert line.startswith("unfilled target: ")
    assert f"(from {key}" in line


def test_the_arguments_of_the_release_are_its_config():
    released = {"image_size": 256, "token_size": 4, "use_l2_norm": True, "num_latent_tokens": 32}
    released |= {f"vit_{side}_model_size": "large" for side in ("enc", "dec")}
    released |= {f"vit_{side}_patch_size": 16 for side in ("enc", "dec")}
    idle = {"codebook_size": 4096, "lpips_loss_weight": 1.0, "use_l1_loss": True}
    assert vae.config_from_original({"params": released | idle}) == FrameVAEConfig()
    assert vae.config_from_original(released | {"num_frame": 16}).temporal
    small = vae.config_from_original(released | {"vit_enc_model_size": "small"})
    assert small.encoder == QueryTransformerConfig(embed_dim=512, num_layers=8, num_heads=8)
    with pytest.raises(ValueError, match="without use_l2_norm is not supported"):
        vae.config_from_original({"use_l2_norm": False})
    with pytest.raises(ValueError, match=r"unknown VAE option\(s\): colour"):
        vae.config_from_original({"colour": 1})


def test_another_checkpoint_is_refused_in_one_line():
    with pytest.raises(UserError, match="no VAE of AR-Diffusion"):
        vae.find_config(shapes_only(read_manifest("ar_diffusion_discriminator")))
