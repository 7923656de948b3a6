"""KL autoencoder of latent diffusion (DynamiCrafter's and DiCoDe's `first_stage_model`)."""

from collections.abc import Mapping
from typing import Any

from convert.engine.plan import Kind
from convert.engine.rules import CONV1X1, CONV2D, Rule, Rules, affine, dense
from dicode_jax.config import without_retired
from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig


def _resnet(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *affine(rf"{source}\.norm1", f"{target}.norm1"),
        *dense(rf"{source}\.conv1", f"{target}.conv1", CONV2D),
        *affine(rf"{source}\.norm2", f"{target}.norm2"),
        *dense(rf"{source}\.conv2", f"{target}.conv2", CONV2D),
        *dense(rf"{source}\.nin_shortcut", f"{target}.shortcut", CONV1X1),
    )


def _attention(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *affine(rf"{source}\.norm", f"{target}.norm"),
        *dense(rf"{source}\.q", f"{target}.q", CONV1X1),
        *dense(rf"{source}\.k", f"{target}.k", CONV1X1),
        *dense(rf"{source}\.v", f"{target}.v", CONV1X1),
        *dense(rf"{source}\.proj_out", f"{target}.out", CONV1X1),
    )


def _side(side: str, way: str) -> tuple[Rule, ...]:
    """Encoder (levels under `down`) or decoder (under `up`)."""
    level = rf"{side}\.{way}\.(\d+)"
    return (
        *dense(rf"{side}\.conv_(in|out)", f"{side}.conv_{{0}}", CONV2D),
        *affine(rf"{side}\.norm_out", f"{side}.norm_out"),
        *_resnet(rf"{level}\.block\.(\d+)", f"{side}.levels.{{0}}.blocks.{{1}}"),
        *_attention(rf"{level}\.attn\.(\d+)", f"{side}.levels.{{0}}.attentions.{{1}}"),
        *dense(rf"{level}\.{way}sample\.conv", f"{side}.levels.{{0}}.resample.conv", CONV2D),
        *_resnet(rf"{side}\.mid\.block_(\d)", f"{side}.middle.block{{0}}"),
        *_attention(rf"{side}\.mid\.attn_1", f"{side}.middle.attention"),
    )


RULES: Rules = (
    *_side("encoder", "down"),
    *_side("decoder", "up"),
    *dense("quant_conv", "quant", CONV1X1),
    *dense("post_quant_conv", "post_quant", CONV1X1),
)

# Options of the original that only have one supported value.
NEUTRAL = {"give_pre_end": False, "use_linear_attn": False}
IDLE = ("monitor", "lossconfig", "ckpt_path")  # of the node of a whole model, for its own training


def config_from_original(config: Mapping[str, Any]) -> AutoencoderKLConfig:
    """Reads `{"ddconfig": {...}, "embed_dim": ...}`, or a `ddconfig` that also holds `embed_dim`.

    Raises:
      ValueError: An option is unknown, or has a value that is not supported.
    """
    outer = {k: v for k, v in config.get("params", config).items() if k not in IDLE}
    inner = dict(outer.pop("ddconfig", None) or outer)
    embed_dim = outer.get("embed_dim", inner.pop("embed_dim", inner.get("z_channels")))
    scale_factor = outer.get("scale_factor", inner.pop("scale_factor", 0.18215))
    for name, value in NEUTRAL.items():
        if inner.pop(name, value) != value:
            raise ValueError(f"autoencoder option {name} is only supported as {value}")
    attention = inner.pop("attn_type", "vanilla")
    if attention not in ("vanilla", "none"):
        raise ValueError(f"attn_type must be 'vanilla' or 'none', got {attention!r}")
    attn_resolutions = tuple(inner.pop("attn_resolutions", ()))
    names = {
        "ch": "channels",
        "ch_mult": "channel_mult",
        "out_ch": "out_channels",
        "num_res_blocks": "num_res_blocks",
        "resolution": "resolution",
        "in_channels": "in_channels",
        "z_channels": "z_channels",
        "double_z": "double_z",
        "dropout": "dropout",
        "resamp_with_conv": "resamp_with_conv",
        "tanh_out": "tanh_out",
    }
    if unknown := sorted(set(inner) - set(names)):
        raise ValueError(f"unknown autoencoder option(s): {', '.join(unknown)}")
    fields = {names[key]: value for key, value in inner.items()}
    if "channel_mult" in fields:
        fields["channel_mult"] = tuple(fields["channel_mult"])
    return AutoencoderKLConfig(
        **without_retired(AutoencoderKLConfig, fields),
        attn_resolutions=attn_resolutions if attention == "vanilla" else (),
        mid_attention=attention == "vanilla",
        embed_dim=embed_dim,
        scale_factor=scale_factor,
    )


KIND = Kind(AutoencoderKL, AutoencoderKLConfig, config_from_original, lambda source, cfg: RULES)
