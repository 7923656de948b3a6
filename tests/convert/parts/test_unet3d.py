"""Conversion of the UNet and the autoencoder: strictness, layouts, option names."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

import convert
from convert.engine.plan import flatten
from convert.engine.rules import ConversionError, Rule
from convert.parts import autoencoder_kl, unet3d
from dicode_jax.models.autoencoder_kl import AutoencoderKL
from dicode_jax.models.unet3d import UNet3D
from dicode_jax.nn.rngs import ShapeRngs

UNET = {
    "in_channels": 3,
    "out_channels": 5,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "channel_mult": [1, 2],
    "num_head_channels": 8,
    "context_dim": 6,
    "temporal_conv": True,
    "use_relative_position": False,
    "image_cross_attention": True,
    "image_cross_attention_scale_learnable": True,
    "addition_attention": True,
    "fs_condition": True,
    "use_linear": True,
}
AUTOENCODER = {
    "ddconfig": {
        "double_z": True,
        "z_channels": 4,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
    "embed_dim": 5,
}


def original_state_dict(model, rules, names):
    """The model's parameters under original names: the rules backwards."""
    flat = {path: np.asarray(leaf[...]) for path, leaf in flatten(nnx.state(model)).items()}
    out = {}
    for name in names:
        for rule in rules:
            if isinstance(rule, Rule) and (match := re.fullmatch(rule.pattern, name)):
                path = rule.target.format(*match.groups())
                if path in flat:
                    out[name] = rule.layout.inverse(flat.pop(path))
                break
    assert not flat, f"no original name for {sorted(flat)[:3]}"
    return out


def unet_names(cfg):
    """Original key names of a UNet with one block per level and attention at the first of two."""
    stages = {
        "input_blocks.1": "rst", "input_blocks.2": "d", "input_blocks.3": "r",
        "middle_block": "rstr",
        "output_blocks.0": "r", "output_blocks.1": "ru", "output_blocks.2": "rst",
        "output_blocks.3": "rst",
    }  # fmt: skip
    norms = ("in_layers.0", "out_layers.0", "temopral_conv.conv1.0", "temopral_conv.conv2.0",
             "temopral_conv.conv3.0", "temopral_conv.conv4.0")  # fmt: skip
    others = ("in_layers.2", "emb_layers.1", "out_layers.3", "skip_connection",
              "temopral_conv.conv1.2", "temopral_conv.conv2.3", "temopral_conv.conv3.3",
              "temopral_conv.conv4.3")  # fmt: skip
    block = ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3", "attn1.to_out.0",
             "attn2.to_out.0")  # fmt: skip
    bare = [f"attn{i}.to_{n}.weight" for i in (1, 2) for n in "qkv"]
    bare += ["attn2.to_k_ip.weight", "attn2.to_v_ip.weight", "attn2.alpha"]
    parts = ["time_embed.0", "time_embed.2", "fps_embedding.0", "fps_embedding.2",
             "input_blocks.0.0", "out.0", "out.2"]  # fmt: skip
    keys = []

    def transformer(prefix):
        parts.extend(f"{prefix}.{n}" for n in ("norm", "proj_in", "proj_out"))
        parts.extend(f"{prefix}.transformer_blocks.0.{n}" for n in block)
        keys.extend(f"{prefix}.transformer_blocks.0.{n}" for n in bare)

    transformer("init_attn.0")
    for stage, letters in stages.items():
        for i, letter in enumerate(letters):
            if letter == "r":
                parts.extend(f"{stage}.{i}.{n}" for n in (*norms, *others))
            elif letter in "st":
                transformer(f"{stage}.{i}")
            else:
                parts.append(f"{stage}.{i}." + ("op" if letter == "d" else "conv"))
    return keys + [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]


@pytest.fixture(scope="module")
def unet():
    return UNet3D(unet3d.config_from_original(UNET), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def unet_state_dict(unet):
    return original_state_dict(unet, unet3d.rules(), unet_names(unet.cfg))


def assert_same_parameters(a, b):
    for x, y in zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b))):
        np.testing.assert_array_equal(x, y)


def test_unet_survives_the_way_to_original_names_and_back(unet, unet_state_dict):
    assert unet_state_dict["init_attn.0.proj_in.weight"].shape == (64, 32, 1)
    assert unet_state_dict["middle_block.0.temopral_conv.conv4.3.weight"].ndim == 5
    assert_same_parameters(convert.from_torch("unet3d", unet_state_dict, UNET), unet)


def test_unet_reads_projections_stored_as_convolutions(unet, unet_state_dict):
    as_conv = dict(unet_state_dict)
    for key, array in unet_state_dict.items():
        if re.search(r"blocks?\.(\d+\.)?[12]\.proj_(in|out)\.weight", key):
            is_spatial = ".1.proj" in key
            as_conv[key] = array[..., None, None] if is_spatial else array[..., None]
    config = UNET | {"use_linear": False}
    assert_same_parameters(convert.from_torch("unet3d", as_conv, config), unet)


def test_older_checkpoints_name_the_frame_stride_embedding_differently(unet, unet_state_dict):
    renamed = {
        k.replace("fps_embedding", "framestride_embed"): v for k, v in unet_state_dict.items()
    }
    assert_same_parameters(convert.from_torch("unet3d", renamed, UNET), unet)


def test_conversion_lists_every_missing_and_unused_key(unet_state_dict):
    broken = dict(unet_state_dict)
    del broken["out.2.bias"]
    broken["out.9.bias"] = np.zeros(3)
    with pytest.raises(ConversionError) as error:
        convert.from_torch("unet3d", broken, UNET)
    assert "conv_out.bias" in str(error.value)
    assert "out.9.bias" in str(error.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dims": 3}, "dims must be 2, got 3"),
        ({"use_fp16": True}, "use_fp16 must be False"),
        ({"num_classes": 10}, "unknown UNet option.*num_classes"),
        ({"use_relative_position": True}, "use_relative_position = True is gone: .*without pos"),
        ({"use_causal_attention": True}, "is_causal = True is gone: .* to all frames"),
        ({"tempspatial_aware": True}, "spatial_aware_conv = True is gone: .*frames alone"),
        ({"conv_resample": False}, "conv_resample = False is gone: resampling by conv"),
    ],
)
def test_unet_options_without_a_counterpart_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        unet3d.config_from_original(UNET | options)


def test_unet_options_that_are_missing_take_the_originals_defaults():
    cfg = unet3d.config_from_original({**UNET, "default_fs": 7})
    assert (cfg.default_fs, cfg.dropout) == (7, 0.0)
    bare = {name: UNET[name] for name in unet3d.REQUIRED} | {"num_heads": 4, "temporal_length": 8}
    with pytest.raises(ValueError, match="use_relative_position = True is gone"):
        unet3d.config_from_original(bare)
    cfg = unet3d.config_from_original(bare | {"use_relative_position": False})
    assert (cfg.channel_mult, cfg.num_heads) == ((1, 2, 4, 8), 4)
    with pytest.raises(ValueError, match=r"missing UNet option.*out_channels"):
        unet3d.config_from_original({k: v for k, v in bare.items() if k != "out_channels"})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"attn_type": "linear"}, "attn_type must be"),
        ({"give_pre_end": True}, "give_pre_end"),
        ({"use_3d": True}, "unknown autoencoder option.*use_3d"),
        ({"double_z": False}, "double_z = False is gone: a posterior of mean"),
    ],
)
def test_autoencoder_options_without_a_counterpart_are_refused(options, match):
    config = {**AUTOENCODER, "ddconfig": AUTOENCODER["ddconfig"] | options}
    with pytest.raises(ValueError, match=match):
        autoencoder_kl.config_from_original(config)


def test_autoencoder_config_is_read_whole():
    cfg = autoencoder_kl.config_from_original(AUTOENCODER)
    assert (cfg.channels, cfg.channel_mult, cfg.embed_dim) == (32, (1, 2), 5)
    model = nnx.eval_shape(lambda: AutoencoderKL(cfg, rngs=ShapeRngs()))
    assert model.encoder.conv_out.kernel.shape == (3, 3, 64, 8)
