"""AR-Diffusion's VAEs: `TiTok_KL`, and `TiTok_KL_wT`, whose decoder looks at earlier frames.

Written against the official release (692 and 1076 keys). Sizes are found from the weights; the
number of heads follows from the width as in the original's table.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from convert.engine.found import Found
from convert.engine.plan import Kind
from convert.engine.rules import (
    CONV1X1,
    CONV2D,
    DROP0,
    LINEAR,
    Rule,
    Rules,
    affine,
    dense,
)
from dicode_jax.errors import UserError
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE, FrameVAEConfig
from dicode_jax.models.maskgit_decoder import MaskGITDecoderConfig
from dicode_jax.models.query_tokenizer import QueryTransformerConfig

# Size -> width, layers, heads.
SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
HEAD_DIM = 64


def _packed(source: str, target: str) -> tuple[Rule, ...]:
    """`nn.MultiheadAttention` with one matrix for queries, keys and values."""
    return (
        Rule(rf"{source}\.in_proj_weight", f"{target}.qkv.kernel", LINEAR),
        Rule(rf"{source}\.in_proj_bias", f"{target}.qkv.bias"),
        *dense(rf"{source}\.out_proj", f"{target}.out"),
    )


def _side(side: str) -> tuple[Rule, ...]:
    block, ours = rf"{side}\.transformer\.(\d+)", f"{side}.transformer.blocks.{{0}}"
    return (
        Rule(rf"{side}\.class_embedding", f"{side}.class_embed"),
        Rule(rf"{side}\.positional_embedding", f"{side}.position_embed"),
        *affine(rf"{side}\.ln_(pre|post)", f"{side}.transformer.norm_{{0}}"),
        *affine(rf"{block}\.ln_1", f"{ours}.attn_norm"),
        *_packed(rf"{block}\.attn", f"{ours}.attn"),
        *affine(rf"{block}\.ln_2", f"{ours}.mlp_norm"),
        *dense(rf"{block}\.mlp\.c_fc", f"{ours}.mlp.up"),
        *dense(rf"{block}\.mlp\.c_proj", f"{ours}.mlp.down"),
    )


def _pixel_block(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *affine(rf"{source}\.norm1", f"{target}.norm1"),
        Rule(rf"{source}\.conv1\.weight", f"{target}.conv1.kernel", CONV2D),
        *affine(rf"{source}\.norm2", f"{target}.norm2"),
        Rule(rf"{source}\.conv2\.weight", f"{target}.conv2.kernel", CONV2D),
        Rule(rf"{source}\.nin_shortcut\.weight", f"{target}.shortcut.kernel", CONV1X1),
    )


_FINE, _COARSE = r"decoder\.fine_temporal_blocks\.(\d+)", r"decoder\.coarse_temporal_blocks\.(\d+)"
_LEVEL = r"pixel_decoder\.up\.(\d+)"

TEMPORAL_RULES: Rules = (
    *affine(rf"{_FINE}\.ln_1", "temporal.fine.{0}.norm"),
    *_packed(rf"{_FINE}\.attn", "temporal.fine.{0}.attn"),
    *affine(rf"{_COARSE}\.ln_(q|k|v)", "temporal.coarse.{0}.norm_{1}"),
    *_packed(rf"{_COARSE}\.attn", "temporal.coarse.{0}"),
)
PIXEL_RULES: Rules = (
    *dense(r"pixel_quantize_conv", "codebook", CONV1X1),
    *dense(r"pixel_decoder\.conv_(in|out)", "pixel_decoder.conv_{0}", CONV2D),
    *_pixel_block(r"pixel_decoder\.mid\.(\d+)", "pixel_decoder.middle.{0}"),
    *_pixel_block(rf"{_LEVEL}\.block\.(\d+)", "pixel_decoder.levels.{0}.blocks.{1}"),
    *dense(rf"{_LEVEL}\.upsample_conv", "pixel_decoder.levels.{0}.upsample.conv", CONV2D),
    *affine(r"pixel_decoder\.norm_out", "pixel_decoder.norm_out"),
)
RULES: Rules = (
    Rule(r"latent_tokens", "encoder.queries"),
    *dense(r"encoder\.patch_embed", "encoder.patch_embed", CONV2D),
    Rule(r"encoder\.latent_token_positional_embedding", "encoder.query_position_embed"),
    *_side("encoder"),
    *dense(r"encoder\.conv_out", "moments_proj", CONV1X1),
    *dense(r"decoder\.decoder_embed", "decoder.token_embed"),
    Rule(r"decoder\.mask_token", "decoder.mask_token", DROP0),
    Rule(r"decoder\.latent_token_positional_embedding", "decoder.token_position_embed"),
    *_side("decoder"),
    *dense(r"decoder\.ffn\.0", "code_up", CONV1X1),
    *dense(r"decoder\.ffn\.2", "code_logits", CONV1X1),
    *TEMPORAL_RULES,
    *PIXEL_RULES,
)
IDLE = ("codebook_size", "commitment_cost", "lpips_loss_weight", "use_l1_loss", "use_checkpoint")


def config_from_original(options: Mapping[str, Any]) -> FrameVAEConfig:
    """Reads the arguments of `TiTok_KL` or, with a `num_frame`, `TiTok_KL_wT`.

    Raises:
      ValueError: An option is unknown, or has a value that is not supported.
    """
    inner = {k: v for k, v in options.get("params", options).items() if k not in IDLE}
    if not inner.pop("use_l2_norm", True):
        raise ValueError("a VAE without use_l2_norm is not supported: none was released")
    temporal = inner.pop("num_frame", None) is not None
    fields = {
        "image_size": inner.pop("image_size", 256),
        "num_tokens": inner.pop("num_latent_tokens", 32),
        "token_dim": inner.pop("token_size", 4),
    }
    for side, name in (("encoder", "enc"), ("decoder", "dec")):
        size = inner.pop(f"vit_{name}_model_size", "large")
        if size not in SIZES:
            raise ValueError(f"vit_{name}_model_size must be one of {', '.join(SIZES)}: {size!r}")
        width, layers, heads = SIZES[size]
        fields[side] = QueryTransformerConfig(
            patch_size=inner.pop(f"vit_{name}_patch_size", 16),
            embed_dim=width,
            num_layers=layers,
            num_heads=heads,
        )
    if inner:
        raise ValueError(f"unknown VAE option(s): {', '.join(sorted(inner))}")
    return FrameVAEConfig(**fields, temporal=temporal)


def find_config(source: Mapping[str, Any]) -> Found:
    """The configuration of a VAE by the shapes of its weights.

    Raises:
      UserError: They are not those of such a VAE.
    """
    shape = {key: tuple(value.shape) for key, value in source.items()}
    try:
        sides = {side: _find_side(shape, side) for side in ("encoder", "decoder")}
        patch = shape["encoder.patch_embed.weight"][-1]
        patches = math.isqrt(shape["encoder.positional_embedding"][0] - 1)
        side = math.isqrt(shape["decoder.positional_embedding"][0] - 1)
        coarse_to_fine = [
            shape[f"pixel_decoder.up.{i}.block.0.conv1.weight"][0]
            for i in range(_count(shape, r"pixel_decoder\.up\.(\d+)\."))
        ]
        width = coarse_to_fine[0]
        image_size = patch * patches
        config = FrameVAEConfig(
            image_size=image_size,
            num_tokens=shape["latent_tokens"][0],
            token_dim=shape["decoder.decoder_embed.weight"][1],
            codebook_size=shape["decoder.ffn.2.weight"][0],
            encoder=dataclasses.replace(sides["encoder"], patch_size=patch),
            decoder=dataclasses.replace(sides["decoder"], patch_size=image_size // side),
            pixel_decoder=MaskGITDecoderConfig(
                z_channels=shape["pixel_quantize_conv.weight"][0],
                channels=width,
                channel_mult=tuple(x // width for x in coarse_to_fine),
                num_res_blocks=_count(shape, r"pixel_decoder\.mid\.(\d+)\."),
            ),
            temporal=any("temporal" in key for key in shape),
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"no VAE of AR-Diffusion: its weights do not make a model ({error}); want the keys of "
            "TiTok_KL, such as latent_tokens and encoder.patch_embed.weight"
        ) from error
    assumed = {
        "encoder.num_heads": config.encoder.num_heads,
        "decoder.num_heads": config.decoder.num_heads,
        "pixel_decoder.num_groups": config.pixel_decoder.num_groups,
    }
    return Found(config, assumed)


def _find_side(shape: Mapping[str, tuple], side: str) -> QueryTransformerConfig:
    width = shape[f"{side}.ln_pre.weight"][0]
    return QueryTransformerConfig(
        embed_dim=width,
        num_layers=_count(shape, rf"{side}\.transformer\.(\d+)\."),
        num_heads=max(1, width // HEAD_DIM),
    )


def _count(shape: Mapping[str, tuple], pattern: str) -> int:
    """How many numbers in a row stand where the pattern has one."""
    numbers = {int(m[1]) for m in map(re.compile(pattern).match, shape) if m}
    return len(numbers)


KIND = Kind(FrameVAE, FrameVAEConfig, config_from_original, lambda source, cfg: RULES)
