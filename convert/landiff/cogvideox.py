"""CogVideoX-2b as diffusers keeps it: names of weights, configurations, noise.

Written against diffusers 0.42.1. Its weights are the original's in other pieces: queries, keys and
values lie apart, two norms hold the modulation of a layer between them, the decoder's levels are
counted from the coarsest, and positions are computed and not stored. One number of diffusers is
left as the original has it: the last norm's epsilon, 1e-6, where diffusers computes with 1e-5.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from convert.engine.plan import Kind
from convert.engine.rules import (
    CONV2D,
    DROP0,
    Rule,
    Rules,
    affine,
    dense,
    prefixed,
    to_numpy,
)
from convert.engine.sources import LazyTensor
from convert.landiff import vae
from convert.landiff.vae import CONV3D, spatial_norm
from convert.parts import hugging_face
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D, AutoencoderCausal3DConfig
from dicode_jax.models.landiff.dit import (
    DenoiserConfig,
    DiTConfig,
    make_base,
    position_table,
)

POSITIONS = "patch_embed.pos_embedding"
_BLOCK, _OURS = r"transformer_blocks\.(\d+)", "lower_blocks.{0}"

TRANSFORMER_RULES: Rules = (
    *dense(r"patch_embed\.proj", "embed.patch", CONV2D),
    *dense(r"patch_embed\.text_proj", "embed.text"),
    Rule(r"patch_embed\.pos_embedding", "embed.positions", DROP0),
    *dense(r"time_embedding\.linear_1", "embed.time.first"),
    *dense(r"time_embedding\.linear_2", "embed.time.last"),
    *dense(rf"{_BLOCK}\.norm\.linear", f"{_OURS}.modulation.linear"),
    *affine(rf"{_BLOCK}\.norm1\.norm", f"{_OURS}.attn_norm"),
    *affine(rf"{_BLOCK}\.norm2\.norm", f"{_OURS}.mlp_norm"),
    *affine(rf"{_BLOCK}\.attn1\.norm_(q|k)", f"{_OURS}.attn.{{1}}_norm"),
    *dense(rf"{_BLOCK}\.attn1\.to_qkv", f"{_OURS}.attn.qkv"),
    *dense(rf"{_BLOCK}\.attn1\.to_out\.0", f"{_OURS}.attn.out"),
    *dense(rf"{_BLOCK}\.ff\.net\.0\.proj", f"{_OURS}.mlp.up"),
    *dense(rf"{_BLOCK}\.ff\.net\.2", f"{_OURS}.mlp.down"),
    *affine(r"norm_final", "head.norm"),
    *affine(r"norm_out\.norm", "head.last_norm"),
    *dense(r"norm_out\.linear", "head.modulation.linear"),
    *dense(r"proj_out", "head.linear"),
)
"""Of the keys as `join` gives them."""


def join(source: Mapping[str, Any], cfg: DiTConfig) -> dict[str, Any]:
    """The transformer's keys with its pieces put together, and with the positions.

    What lacks a piece, or has one that does not fit, stays in pieces, which no rule takes.
    """
    out = dict(source)
    for i, kind in itertools.product(range(cfg.num_layers), ("weight", "bias")):
        block = f"transformer_blocks.{i}"
        pieces = [f"{block}.attn1.to_{name}.{kind}" for name in "qkv"]
        _join(out, pieces, f"{block}.attn1.to_qkv.{kind}", np.concatenate)
        pieces = [f"{block}.norm{number}.linear.{kind}" for number in (1, 2)]
        _join(out, pieces, f"{block}.norm.linear.{kind}", _modulation)
    out.setdefault(POSITIONS, position_table(cfg)[None])
    return out


def _modulation(norms: Sequence[np.ndarray]) -> np.ndarray:
    """Shift, scale and gate of both norms for the video, then for the text."""
    halves = [np.split(norm, 2) for norm in norms]
    return np.concatenate([half[i] for i in (0, 1) for half in halves])


def _join(out: dict[str, Any], pieces: Sequence[str], name: str, join: Callable) -> None:
    if not all(piece in out for piece in pieces):
        return
    tensors = [out[piece] for piece in pieces]
    shape, dtype = tuple(tensors[0].shape), tensors[0].dtype
    same = all(tuple(x.shape) == shape and x.dtype == dtype for x in tensors)
    if not same or not shape or shape[0] % 2:
        return
    for piece in pieces:
        del out[piece]
    whole = (len(pieces) * shape[0], *shape[1:])
    out[name] = LazyTensor(whole, dtype, lambda: join([to_numpy(x) for x in tensors]))


def vae_rules(cfg: AutoencoderCausal3DConfig) -> Rules:
    """The table of the autoencoder's keys."""
    count = len(cfg.encoder_mult)
    down = [(f"down_blocks.{i}", "downsamplers", i) for i in range(count)]
    up = [(f"up_blocks.{count - 1 - i}", "upsamplers", i) for i in range(count)]
    return (
        *prefixed(_side(affine, down), "encoder.", "encoder."),
        *prefixed(_side(spatial_norm, up), "decoder.", "decoder."),
    )


def _side(norm, levels: Sequence[tuple[str, str, int]]) -> Rules:
    block = functools.partial(vae.block, norm, shortcut="conv_shortcut")
    rules = [
        *dense(r"conv_(in|out)\.conv", "conv_{0}", CONV3D),
        *block(r"mid_block\.resnets\.(\d+)", "middle.{0}"),
        *norm(r"norm_out", "norm_out"),
    ]
    for name, resampler, i in levels:
        source = name.replace(".", r"\.")
        rules += block(rf"{source}\.resnets\.(\d+)", f"levels.{i}.blocks.{{0}}")
        rules += dense(rf"{source}\.{resampler}\.0\.conv", f"levels.{i}.resample.conv", CONV2D)
    return rules


# Options that change what is computed: only these values are supported.
_TRANSFORMER = {
    "_class_name": "CogVideoXTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "ofs_embed_dim": None,
    "patch_bias": True,
    "patch_size_t": None,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "timestep_activation_fn": "silu",
    "use_learned_positional_embeddings": False,
    "use_rotary_positional_embeddings": False,
}
_VAE = {
    "_class_name": "AutoencoderKLCogVideoX",
    "act_fn": "silu",
    "in_channels": 3,
    "invert_scale_latents": False,
    "latents_mean": None,
    "latents_std": None,
    "norm_eps": 1e-6,
    "out_channels": 3,
    "shift_factor": None,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
_RELEASED = DenoiserConfig().schedule
_SCHEDULE = {
    "beta_end": _RELEASED.linear_end,
    "beta_schedule": "scaled_linear",
    "beta_start": _RELEASED.linear_start,
    "num_train_timesteps": _RELEASED.num_timesteps,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": _RELEASED.zero_terminal_snr,
    "snr_shift_scale": _RELEASED.snr_shift,
}
# Options without any effect on weights and noise: how a scheduler walks, and nominal sizes.
_IDLE = {"_diffusers_version", "force_upcast", "sample_height", "sample_width"}
_STEPPING = {
    *("_class_name", "_diffusers_version", "clip_sample", "clip_sample_range", "sample_max_value"),
    *("set_alpha_to_one", "steps_offset", "timestep_spacing"),
}


def read_transformer(original: Mapping[str, Any]) -> DiTConfig:
    """Sizes by the `config.json` of the transformer.

    Raises:
      ValueError: It is of another CogVideoX, or of something else.
    """
    if original.get("use_rotary_positional_embeddings"):
        raise ValueError(
            "its positions are rotary, as those of CogVideoX-5b and 1.5; only 2b is a base of "
            "LanDiff"
        )
    return hugging_face.read_options(
        original, title="CogVideoX", neutral=_TRANSFORMER, idle=_IDLE, take=_take_transformer
    )


def _take_transformer(left: dict[str, Any]) -> DiTConfig:
    take, default = left.pop, DiTConfig()
    heads, channels = take("num_attention_heads", 30), take("in_channels", default.channels)
    if (out := take("out_channels", channels)) not in (None, channels):
        raise ValueError(f"out_channels={out!r} is not supported; only in_channels, {channels}, is")
    return DiTConfig(
        num_frames=(take("sample_frames", 49) - 1) // 4 + 1,
        height=take("sample_height", default.height),
        width=take("sample_width", default.width),
        channels=channels,
        patch_size=take("patch_size", default.patch_size),
        embed_dim=heads * take("attention_head_dim", 64),
        num_layers=take("num_layers", default.num_layers),
        num_heads=heads,
        time_dim=take("time_embed_dim", default.time_dim),
        text_len=take("max_text_seq_length", default.text_len),
        text_dim=take("text_embed_dim", default.text_dim),
        interpolation=take("spatial_interpolation_scale", default.interpolation),
    )


def read_vae(original: Mapping[str, Any]) -> AutoencoderCausal3DConfig:
    """Sizes by the `config.json` of the autoencoder.

    Raises:
      ValueError: It is of another one.
    """
    return hugging_face.read_options(
        original, title="CogVideoX's autoencoder", neutral=_VAE, idle=_IDLE, take=_take_vae
    )


def _take_vae(left: dict[str, Any]) -> AutoencoderCausal3DConfig:
    take, default = left.pop, AutoencoderCausal3DConfig()
    widths = take("block_out_channels", [128, 256, 256, 512])
    groups = take("norm_num_groups", default.num_groups)
    if not widths or any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels must be multiples of the first, got {widths}")
    for side in ("Down", "Up"):
        kind, name = f"CogVideoX{side}Block3D", f"{side.lower()}_block_types"
        if list(kinds := take(name, [kind] * len(widths))) != [kind] * len(widths):
            raise ValueError(f"{name}={kinds!r} is not supported; only {kind} is, for each width")
    mult, blocks = tuple(width // widths[0] for width in widths), take("layers_per_block", 3)
    return AutoencoderCausal3DConfig(
        channels=widths[0],
        encoder_mult=mult,
        decoder_mult=mult,
        encoder_blocks=blocks,
        decoder_blocks=blocks + 1,
        z_channels=take("latent_channels", default.z_channels),
        time_factor=take("temporal_compression_ratio", default.time_factor),
        scale_factor=take("scaling_factor", default.scale_factor),
        num_groups=groups,
    )


def check_schedule(original: Mapping[str, Any]) -> None:
    """Compares the noise that a scheduler's config tells with that of CogVideoX-2b.

    Raises:
      ValueError: It is other noise, or not told.
    """
    if missing := sorted(_SCHEDULE.keys() - original.keys()):
        raise ValueError(f"missing option(s): {', '.join(missing)}")
    neutral = _SCHEDULE | {"trained_betas": None}
    options = {"title": "CogVideoX's scheduler", "neutral": neutral, "idle": _STEPPING}
    hugging_face.read_options(original, **options, take=lambda left: None)


TRANSFORMER = Kind(make_base, DiTConfig, read_transformer, lambda source, cfg: TRANSFORMER_RULES)
VAE = Kind(
    AutoencoderCausal3D, AutoencoderCausal3DConfig, read_vae, lambda source, cfg: vae_rules(cfg)
)
