"""Video UNet of DynamiCrafter and DiCoDe (`model.diffusion_model` in their checkpoints)."""

from collections.abc import Mapping
from typing import Any

from convert.engine.plan import Kind
from convert.engine.rules import (
    CONV1D1,
    CONV1X1,
    CONV2D,
    CONV3D_T,
    LINEAR,
    Layout,
    Rule,
    Rules,
    affine,
    dense,
)
from dicode_jax.config import without_retired
from dicode_jax.models.unet3d import UNet3D, UNet3DConfig


def _resnet(source: str, target: str) -> tuple[Rule, ...]:
    """A residual block; the misspelt `temopral_conv` is the original's."""
    rules = (
        *affine(rf"{source}\.in_layers\.0", f"{target}.resnet.norm1"),
        *dense(rf"{source}\.in_layers\.2", f"{target}.resnet.conv1", CONV2D),
        *dense(rf"{source}\.emb_layers\.1", f"{target}.resnet.embed_proj"),
        *affine(rf"{source}\.out_layers\.0", f"{target}.resnet.norm2"),
        *dense(rf"{source}\.out_layers\.3", f"{target}.resnet.conv2", CONV2D),
        *dense(rf"{source}\.skip_connection", f"{target}.resnet.shortcut", CONV1X1),
    )
    for i in range(4):
        conv, norm = rf"{source}\.temopral_conv\.conv{i + 1}", f"{target}.temporal_conv"
        index = 2 if i == 0 else 3  # the first has no dropout before its convolution
        rules += affine(rf"{conv}\.0", f"{norm}.norms.{i}")
        rules += dense(rf"{conv}\.{index}", f"{norm}.convs.{i}", CONV3D_T)
    return rules


def _transformer(source: str, target: str, block: str, projection: Layout) -> tuple[Rule, ...]:
    """A spatial or temporal transformer. `block` is the format field of the block's number."""
    inner, blocks = rf"{source}\.transformer_blocks\.(\d+)", f"{target}.blocks.{block}"
    rules = (
        *affine(rf"{source}\.norm", f"{target}.norm"),
        *dense(rf"{source}\.proj_in", f"{target}.proj_in", projection),
        *dense(rf"{source}\.proj_out", f"{target}.proj_out", projection),
        *dense(rf"{inner}\.ff\.net\.0\.proj", f"{blocks}.mlp.up"),
        *dense(rf"{inner}\.ff\.net\.2", f"{blocks}.mlp.down"),
    )
    for i in (1, 2, 3):
        rules += affine(rf"{inner}\.norm{i}", f"{blocks}.norm{i}")
    for i in (1, 2):
        attention, to = rf"{inner}\.attn{i}", f"{blocks}.attention{i}"
        for name in "qkv":
            rules += (Rule(rf"{attention}\.to_{name}\.weight", f"{to}.{name}.kernel", LINEAR),)
        for name in "kv":
            image = rf"{attention}\.to_{name}_ip\.weight"
            rules += (Rule(image, f"{to}.{name}_image.kernel", LINEAR),)
        rules += dense(rf"{attention}\.to_out\.0", f"{to}.out")
        rules += (Rule(rf"{attention}\.alpha", f"{to}.alpha"),)
    return rules


def rules(*, use_linear: bool = True) -> Rules:
    """The table for one choice of the option that changes layouts, not modules.

    Args:
      use_linear: Projections around the transformers are linear layers, not 1x1 convolutions.
        Those of `init_attn` are always convolutions.
    """
    spatial_projection = LINEAR if use_linear else CONV1X1
    temporal_projection = LINEAR if use_linear else CONV1D1
    table = (
        *dense(r"time_embed\.0", "time_embed.up"),
        *dense(r"time_embed\.2", "time_embed.down"),
        *dense(r"(?:fps_embedding|framestride_embed)\.0", "fs_embed.up"),
        *dense(r"(?:fps_embedding|framestride_embed)\.2", "fs_embed.down"),
        *dense(r"input_blocks\.0\.0", "down_stages.0.layers.0", CONV2D),
        *_transformer(r"init_attn\.0", "init_attention", "{0}", CONV1D1),
        *affine(r"out\.0", "norm_out"),
        *dense(r"out\.2", "conv_out", CONV2D),
        *dense(r"input_blocks\.(\d+)\.(\d+)\.op", "down_stages.{0}.layers.{1}.conv", CONV2D),
        *dense(r"output_blocks\.(\d+)\.(\d+)\.conv", "up_stages.{0}.layers.{1}.conv", CONV2D),
    )
    # In every stage the spatial transformer comes second and the temporal one third.
    for source, target, block in (
        (r"input_blocks\.(\d+)", "down_stages.{0}", "{1}"),
        (r"output_blocks\.(\d+)", "up_stages.{0}", "{1}"),
        (r"middle_block", "mid_stage", "{0}"),
    ):
        layer = "{1}" if "{0}" in target else "{0}"
        table += _resnet(rf"{source}\.(\d+)", f"{target}.layers.{layer}")
        table += _transformer(rf"{source}\.1", f"{target}.layers.1", block, spatial_projection)
        table += _transformer(rf"{source}\.2", f"{target}.layers.2", block, temporal_projection)
    return table


# Original name -> ours.
NAMES = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "model_channels": "model_channels",
    "num_res_blocks": "num_res_blocks",
    "attention_resolutions": "attention_resolutions",
    "channel_mult": "channel_mult",
    "dropout": "dropout",
    "conv_resample": "conv_resample",
    "context_dim": "context_dim",
    "use_scale_shift_norm": "use_scale_shift_norm",
    "resblock_updown": "resblock_updown",
    "transformer_depth": "transformer_depth",
    "temporal_conv": "temporal_conv",
    "tempspatial_aware": "spatial_aware_conv",
    "temporal_attention": "temporal_attention",
    "use_relative_position": "use_relative_position",
    "use_causal_attention": "is_causal",
    "temporal_length": "temporal_length",
    "addition_attention": "init_attention",
    "image_cross_attention": "image_cross_attention",
    "image_cross_attention_scale_learnable": "learnable_image_scale",
    "default_fs": "default_fs",
    "fs_condition": "fs_condition",
    "use_checkpoint": "remat",
}
# The original's defaults, where they differ from those of `UNet3DConfig`.
DEFAULTS = {
    "dropout": 0.0,
    "channel_mult": (1, 2, 4, 8),
    "context_dim": None,
    "temporal_conv": False,
    "use_relative_position": True,
    "temporal_length": None,
    "addition_attention": False,
    "image_cross_attention": False,
    "image_cross_attention_scale_learnable": False,
    "default_fs": 4,
    "fs_condition": False,
}
# Options with one supported value, and options that are read elsewhere.
FIXED = {"dims": 2, "use_fp16": False}
READ_ELSEWHERE = ("num_heads", "num_head_channels", "temporal_selfatt_only", "use_linear")
REQUIRED = (
    "in_channels",
    "out_channels",
    "model_channels",
    "num_res_blocks",
    "attention_resolutions",
)


def config_from_original(
    config: Mapping[str, Any], *, context_rule: str = "length"
) -> UNet3DConfig:
    """Reads the arguments of the original `UNetModel`, or a config node with those as `params`.

    Args:
      context_rule: "length" for DynamiCrafter, "per_frame" for DiCoDe; their arguments are alike.

    Raises:
      ValueError: An option is unknown, missing or gone, or has a value that is not supported.
    """
    options = dict(config.get("params", config))
    known = {*NAMES, *FIXED, *READ_ELSEWHERE}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"unknown UNet option(s): {', '.join(unknown)}")
    if missing := [name for name in REQUIRED if name not in options]:
        raise ValueError(f"missing UNet option(s): {', '.join(missing)}")
    for name, value in FIXED.items():
        if options.get(name, value) != value:
            raise ValueError(f"UNet option {name} must be {value}, got {options[name]}")
    options = DEFAULTS | options
    fields = {ours: options[name] for name, ours in NAMES.items() if name in options}
    fields["channel_mult"] = tuple(fields["channel_mult"])
    fields["attention_resolutions"] = tuple(sorted(fields["attention_resolutions"]))  # a set
    head_dim, num_heads = options.get("num_head_channels", -1), options.get("num_heads", -1)
    by_width = head_dim not in (-1, None)  # the original then ignores num_heads
    return UNet3DConfig(
        **without_retired(UNet3DConfig, fields),
        head_dim=head_dim if by_width else None,
        num_heads=None if by_width or num_heads in (-1, None) else num_heads,
        init_attention_context=not options.get("temporal_selfatt_only", True),
        context_rule=context_rule,
    )


def uses_linear(state_dict: Mapping[str, Any], prefix: str = "") -> bool:
    """Whether the projections around the transformers are stored as linear layers."""
    key = f"{prefix}middle_block.1.proj_in.weight"
    return key not in state_dict or len(state_dict[key].shape) == 2


KIND = Kind(
    UNet3D,
    UNet3DConfig,
    config_from_original,
    lambda source, cfg: rules(use_linear=uses_linear(source)),
)
