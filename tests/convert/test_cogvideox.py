"""`python -m convert cogvideox`: weights of CogVideoX-2b under diffusers' names.

They are those of the original under other names and in other pieces, as diffusers' own script
changes them: small ones are written so, and must come back as the original's table reads them.
"""

import json
import pathlib

import numpy as np
import pytest
from convert_names import state_dict
from safetensors.numpy import save_file
from tiny import random_module
from tiny_landiff import TINY, TINY_VAE

from convert import cogvideox as command
from convert import to_torch
from convert.engine.sources import open_source
from convert.landiff import cogvideox, dit, vae
from convert.parts import t5
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D, AutoencoderCausal3DConfig
from dicode_jax.models.landiff.dit import DiTConfig, make_base, position_table
from dicode_jax.models.t5 import T5Encoder, T5EncoderConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.storage import weights

DIT = TINY.dit
WORDS = pathlib.Path(__file__).parents[1] / "text/small_spiece.model"
PLAIN = {
    "transformer.layers.": "transformer_blocks.",
    "attention.dense": "attn1.to_out.0",
    "post_attention_layernorm": "norm2.norm",
    "input_layernorm": "norm1.norm",
    "mlp.dense_h_to_4h": "ff.net.0.proj",
    "mlp.dense_4h_to_h": "ff.net.2",
    "transformer.final_layernorm": "norm_final",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.linear": "proj_out",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    "mixins.patch_embed": "patch_embed",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
}
OF_VAE = {
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    ".block.": ".resnets.",
    "encoder.down.": "encoder.down_blocks.",
    "downsample.": "downsamplers.0.",
    "upsample.": "upsamplers.0.",
    "nin_shortcut": "conv_shortcut",
    "decoder.up.0.": "decoder.up_blocks.one.",
    "decoder.up.1.": "decoder.up_blocks.0.",
    "up_blocks.one": "up_blocks.1",
}
TRANSFORMER_JSON = {
    "_class_name": "CogVideoXTransformer3DModel", "_diffusers_version": "0.30.0",
    "activation_fn": "gelu-approximate", "attention_bias": True, "attention_head_dim": 64,
    "dropout": 0.0, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 16,
    "max_text_seq_length": 226, "norm_elementwise_affine": True, "norm_eps": 1e-05,
    "num_attention_heads": 30, "num_layers": 30, "out_channels": 16, "patch_size": 2,
    "sample_frames": 49, "sample_height": 60, "sample_width": 90,
    "spatial_interpolation_scale": 1.875, "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0, "text_embed_dim": 4096, "time_embed_dim": 512,
    "timestep_activation_fn": "silu", "use_rotary_positional_embeddings": False,
}  # fmt: skip
VAE_JSON = {
    "_class_name": "AutoencoderKLCogVideoX", "act_fn": "silu",
    "block_out_channels": [128, 256, 256, 512], "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "force_upcast": True, "in_channels": 3, "latent_channels": 16, "latents_mean": None,
    "latents_std": None, "layers_per_block": 3, "norm_eps": 1e-06, "norm_num_groups": 32,
    "out_channels": 3, "sample_height": 480, "sample_width": 720, "scaling_factor": 1.15258426,
    "shift_factor": None, "temporal_compression_ratio": 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4, "use_post_quant_conv": False,
    "use_quant_conv": False,
}  # fmt: skip
SCHEDULER_JSON = {
    "_class_name": "CogVideoXDDIMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000,
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "set_alpha_to_one": True,
    "snr_shift_scale": 3.0, "steps_offset": 0, "timestep_spacing": "trailing",
    "trained_betas": None,
}  # fmt: skip
SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "out_channels": 3,
    "sample_frames": 5, "sample_height": 4, "sample_width": 6, "num_layers": 3,
    "time_embed_dim": 5, "max_text_seq_length": 7, "text_embed_dim": 9,
}  # fmt: skip
SMALL_VAE = {
    "block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 3,
    "temporal_compression_ratio": 2, "down_block_types": ["CogVideoXDownBlock3D"] * 2,
    "up_block_types": ["CogVideoXUpBlock3D"] * 2,
}  # fmt: skip
TEXT = T5EncoderConfig(num_layers=1, num_heads=2, embed_dim=9, head_dim=4, mlp_dim=7, vocab_size=90)
TEXT_JSON = {
    "num_layers": 1, "num_heads": 2, "d_model": 9, "d_kv": 4, "d_ff": 7, "vocab_size": 90,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def renamed(name, names):
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def as_diffusers(original):
    """The transformer's arrays under diffusers' names, without the table of positions."""
    out = {}
    for key, array in original.items():
        name, kind = key.removeprefix(dit.ALONE).rsplit(".", 1)
        number = name.split(".")[3] if "adaLN_modulations" in name else name.split(".")[-1]
        block = f"transformer_blocks.{number}"
        if "query_key_value" in name:
            block = f"transformer_blocks.{name.split('.')[2]}.attn1"
            out |= zip((f"{block}.to_{x}.{kind}" for x in "qkv"), np.split(array, 3), strict=True)
        elif "adaLN_modulations" in name:  # of attention and of the other, video before text
            twelve = np.split(array, 12)
            for norm, first in ((1, 0), (2, 3)):
                six = [*twelve[first : first + 3], *twelve[first + 6 : first + 9]]
                out[f"{block}.norm{norm}.linear.{kind}"] = np.concatenate(six)
        elif "layernorm_list" in name:
            out[f"{block}.attn1.norm_{'q' if 'query' in name else 'k'}.{kind}"] = array
        elif "pos_embed" not in name:
            out[f"{renamed(name, PLAIN)}.{kind}"] = array
    return out


def put(folder, name, config, tensors=None):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(config))
    if tensors is not None:
        arrays = {key: np.ascontiguousarray(array) for key, array in tensors.items()}
        save_file(arrays, (folder / name).parent / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def originals():
    """Weights as the original stores them."""
    base = random_module(lambda: make_base(DIT, rngs=ShapeRngs()))
    ours = random_module(lambda: AutoencoderCausal3D(TINY_VAE, rngs=ShapeRngs()))
    return state_dict(base, dit.BASE.rules({}, DIT)), state_dict(ours, vae.RULES)


@pytest.fixture
def source(originals, tmp_path):
    """A small pipeline as diffusers stores it."""
    root = tmp_path / "CogVideoX"
    of_dit, of_vae = originals
    put(root, "transformer/config.json", TRANSFORMER_JSON | SMALL, as_diffusers(of_dit))
    small = {renamed(key, OF_VAE): array for key, array in of_vae.items()}
    put(root, "vae/config.json", VAE_JSON | SMALL_VAE, small)
    put(root, command.SCHEDULER, SCHEDULER_JSON)
    return root


def convert(source, *more):
    out = source.parent / "out"
    return command.main([str(source), "--out", str(out), *more]), out


def test_the_published_configurations_are_the_defaults():
    assert cogvideox.read_transformer(TRANSFORMER_JSON) == DiTConfig()
    assert cogvideox.read_vae(VAE_JSON) == AutoencoderCausal3DConfig()
    cogvideox.check_schedule(SCHEDULER_JSON)


def test_diffusers_weights_are_read_as_the_original_s(source, originals, capsys):
    root, words = source / "text_encoder", source / "tokenizer/spiece.model"
    put(source, "text_encoder/config.json", TEXT_JSON)
    encoder = random_module(lambda: T5Encoder(TEXT, rngs=ShapeRngs()))
    save_file(state_dict(encoder, t5.RULES), root / "model.safetensors")
    words.parent.mkdir()
    words.write_bytes(WORDS.read_bytes())
    status, out = convert(source, "--text-encoder")
    assert status == 0
    assert "transformer, vae, painter_text of CogVideoX-2b" in capsys.readouterr().out
    base, cfg = weights.load_module(out / "transformer", make_base, DiTConfig)
    assert cfg == DIT
    stored, cfg = weights.load_module(out / "vae", AutoencoderCausal3D, AutoencoderCausal3DConfig)
    assert cfg == TINY_VAE
    assert weights.load_module(out / "painter_text", T5Encoder, T5EncoderConfig)[1] == TEXT
    assert (out / "painter_text/spiece.model").read_bytes() == WORDS.read_bytes()
    of_dit, of_vae = originals
    # The original stores its positions, and diffusers computes them.
    of_dit = dict(of_dit)
    positions = of_dit.pop(f"{dit.ALONE}mixins.pos_embed.pos_embedding")
    found = state_dict(base, dit.BASE.rules({}, DIT)) | state_dict(stored, vae.RULES)
    made = found.pop(f"{dit.ALONE}mixins.pos_embed.pos_embedding")
    assert made.shape == positions.shape
    np.testing.assert_array_equal(made[0], position_table(DIT))
    assert found.keys() == of_dit.keys() | of_vae.keys()
    for key, array in (of_dit | of_vae).items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
    file = source.parent / "original.safetensors"
    assert to_torch.main([str(out / "transformer"), "--out", str(file)]) == 0
    assert open_source(file).keys() == {*of_dit, f"{dit.ALONE}mixins.pos_embed.pos_embedding"}


def test_another_cogvideox_and_other_noise_are_refused_in_one_line(source, capsys):
    for name, change, told in (
        ("transformer/config.json", {"use_rotary_positional_embeddings": True}, "only 2b is"),
        ("transformer/config.json", {"patch_size_t": 2}, "patch_size_t=2 is not supported"),
        ("transformer/config.json", {"out_channels": 4}, "out_channels=4"),
        ("transformer/config.json", {"num_layers": 500}, "500 layers"),
        ("vae/config.json", {"use_quant_conv": True}, "use_quant_conv=True"),
        ("vae/config.json", {"block_out_channels": [32, 48]}, "multiples of the first"),
        (command.SCHEDULER, {"snr_shift_scale": 1.0}, "snr_shift_scale=1.0"),
    ):
        before = (source / name).read_text()
        (source / name).write_text(json.dumps(json.loads(before) | change))
        status, out = convert(source)
        err = capsys.readouterr().err
        assert (status, err.count("\n")) == (2, 1)
        assert told in err
        assert not out.exists()
        (source / name).write_text(before)


def test_every_key_is_used_and_every_piece_is_wanted(source, capsys):
    path = source / "transformer/diffusion_pytorch_model.safetensors"
    tensors = {key: tensor.numpy() for key, tensor in open_source(path).items()}
    lost = tensors.pop("transformer_blocks.1.attn1.to_k.weight")
    save_file(tensors | {"transformer_blocks.1.attn1.to_z.weight": lost}, path)
    report = source.parent / "report.json"
    assert convert(source, "--report", str(report))[0] == 2
    problems = json.loads(report.read_text())["problems"]
    assert [line.split(" (")[0] for line in problems] == [
        "unfilled target: lower_blocks.1.attn.qkv.kernel",
        *(f"unused source key: transformer_blocks.1.attn1.to_{x}.weight" for x in "qvz"),
    ]
