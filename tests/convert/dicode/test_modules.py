"""Whole DiCoDe checkpoints: what is read, what is refused, wrappers, the noise schedule.

Numbers are compared with the original by the parity tests.
"""

import dataclasses

import numpy as np
import pytest

import convert
from convert.dicode import modules as dicode
from convert.engine.rules import ConversionError
from dicode_jax.diffusion.schedules import PERSISTENT_BUFFERS

OPTIONS = {
    "rescale_betas_zero_snr": True,
    "parameterization": "v",
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "timesteps": 1000,
    "conditioning_key": "crossattn",
    "image_size": [6, 8],
    "scale_factor": 0.18215,
    "use_ema": False,
    "uncond_prob": 0.05,
    "image_proj_type": "headrear",
    "no_text": True,
    "unet_config": {
        "params": {
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "attention_resolutions": [1],
            "num_res_blocks": 1,
            "channel_mult": [1],
            "num_head_channels": 8,
            "context_dim": 24,
            "use_relative_position": False,
            "image_cross_attention": True,
        }
    },
    "first_stage_config": {
        "params": {
            "embed_dim": 4,
            "monitor": "val/rec_loss",
            "lossconfig": {"target": "torch.nn.Identity"},
            "ddconfig": {
                "double_z": True,
                "z_channels": 4,
                "resolution": 32,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
            },
        }
    },
    "cond_stage_config": {"params": {"freeze": True, "layer": "penultimate"}},
    "img_cond_stage_config": {"params": {"freeze": True}},
    "image_proj_stage_config": {
        "params": {"dim": 16, "depth": 1, "num_queries": 5, "embedding_dim": 40, "output_dim": 24}
    },
    "clip": {
        "image_size": 28,
        "patch_size": 14,
        "vision_width": 40,
        "vision_layers": 2,
        "vision_head_width": 8,
        "embed_dim": 12,
        "text_width": 24,
        "text_layers": 2,
        "text_heads": 4,
        "context_length": 77,
        "vocab_size": 64,
    },
}


@pytest.fixture(scope="module")
def buffers():
    schedule = dicode.config_from_original(OPTIONS).decoder.schedule
    return {name: schedule.table(name) for name in PERSISTENT_BUFFERS}


def test_the_original_configuration_is_read_as_it_is():
    cfg = dicode.config_from_original({"model": {"target": "x", "params": OPTIONS}})
    assert cfg == dicode.config_from_original(OPTIONS)
    assert cfg.decoder.schedule.zero_terminal_snr
    assert cfg.decoder.schedule.parameterization == "v"
    assert cfg.decoder.num_tokens == cfg.tokenizer.num_tokens == 5
    assert cfg.decoder.unet.context_rule == "per_frame"
    assert cfg.decoder.latent_shape == (6, 8, 4)
    assert (cfg.text_layer, cfg.lm) == ("penultimate", None)
    assert (cfg.loss.uncond_prob, cfg.loss.no_text) == (0.05, True)


def test_absent_options_have_the_originals_defaults():
    names = ("parameterization", "rescale_betas_zero_snr", "linear_start", "linear_end")
    left = {k: v for k, v in OPTIONS.items() if k not in (*names, "no_text", "uncond_prob")}
    cfg = dicode.config_from_original(left)
    schedule = cfg.decoder.schedule
    assert (schedule.parameterization, schedule.zero_terminal_snr) == ("eps", False)
    assert (schedule.linear_start, schedule.linear_end) == (1e-4, 2e-2)
    assert (cfg.loss.uncond_prob, cfg.loss.no_text) == (0.2, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_ema": True}, "use_ema"),
        ({"scale_by_std": True}, "scale_by_std"),
        ({"conditioning_key": "hybrid"}, "'hybrid'"),
        ({"conditioning_key": "hybrid_concat"}, "image_cat_stage_config"),
        ({"image_proj_type": "headrear_cat"}, "headrear_cat"),
        ({"image_proj_type": None}, "None"),
        ({"uncond_type": "mean"}, "'mean'"),
        ({"image_proj_type": "fullseq"}, "'fullseq' is gone: headrear, the tokens of two key"),
        ({"uncond_type": "zero_embed"}, "null_text = 'zeros' is gone: the empty prompt"),
        ({"use_sec_mmt": True}, "use_sec_mmt = True is gone: the denoising loss alone"),
        ({"vae_projector_config": {}}, "use_vae = True is gone: the resampler's tokens"),
        ({"first_block_trainable": False}, "first_block"),
        ({"colour": 3}, "unknown option.*colour"),
    ],
)
def test_what_cannot_be_honoured_is_refused_and_not_ignored(change, message):
    with pytest.raises(ValueError, match=message):
        dicode.config_from_original(OPTIONS | change)


def test_noise_options_reach_the_loss():
    options = {"noise_strength": 0.1, "vae_kl_loss_weight": 0.01}  # the second is of what is gone
    assert dicode.config_from_original(OPTIONS | options).loss.offset_noise == 0.1


def test_a_schedule_that_is_not_the_configured_one_is_an_error(buffers):
    cfg = dicode.config_from_original(OPTIONS).decoder
    assert dicode.check_schedule(buffers, cfg) == []
    half = {name: table.astype(np.float16) for name, table in buffers.items()}
    assert dicode.check_schedule(half, cfg) == []
    other = dataclasses.replace(
        cfg, schedule=dataclasses.replace(cfg.schedule, zero_terminal_snr=False)
    )
    lines = dicode.check_schedule(buffers, other)
    assert lines[0].startswith("betas: the noise schedule in the checkpoint is another one")
    assert "they fit zero_terminal_snr=True, parameterization=v" in lines[0]
    short = buffers | {"betas": buffers["betas"][:10]}
    assert "they fit no known schedule" in dicode.check_schedule(short, cfg)[0]
    scaled = buffers | {"scale_factor": np.float32(0.2)}
    assert dicode.check_schedule(scaled, cfg) == [
        "scale_factor: 0.2 in the checkpoint, 0.18215 by the config"
    ]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d,
        lambda d: {"state_dict": d, "epoch": 3},
        lambda d: {"module": {f"_forward_module.{k}": v for k, v in d.items()}},
        lambda d: {f"_forward_module.{k}": v for k, v in d.items()},
    ],
)
def test_wrapped_checkpoints_are_unwrapped(wrap):
    inner = {"betas": np.ones(3), "model.diffusion_model.framestride_embed.0.bias": np.ones(2)}
    got = dicode.unwrap(wrap(inner))
    assert set(got) == {"betas", "model.diffusion_model.fps_embedding.0.bias"}


def test_everything_that_does_not_fit_is_reported_at_once(buffers):
    source = buffers | {
        "betas": buffers["betas"] * 2,
        "discriminator.weight": np.zeros(3),
        "embedder.model.visual.class_embedding": np.zeros(41),
        "image_proj_model.extra": np.zeros(2),
        "model.diffusion_model.out.2.bias": np.zeros(5),
    }
    with pytest.raises(ConversionError) as error:
        convert.from_torch("dicode", source, OPTIONS)
    message = str(error.value)
    for part in (
        "unused source key: discriminator.weight",
        "betas: the noise schedule in the checkpoint",
        "unused source key: image_proj_model.extra",
        "embedder.model.visual.class_embedding: shape (41,)",
        "model.diffusion_model.out.2.bias: shape (5,)",
        "unfilled target: resampler.latents",
        "unfilled target: unet.conv_out.kernel",
        "unfilled target: token_embed",
    ):
        assert part in message, part


def test_a_language_model_without_its_sizes_is_refused():
    with pytest.raises(ValueError, match="gpt2"):
        convert.from_torch("dicode", {"llm_agent.llm.transformer.wte.weight": np.ones(2)}, OPTIONS)
