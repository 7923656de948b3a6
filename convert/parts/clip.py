"""OpenCLIP checkpoints (`open_clip_pytorch_model.bin` and its parts) to the two CLIP towers.

Written against open_clip 2.22 and 3.3, which share key names. The same tables serve the two partial
copies in a DiCoDe or DynamiCrafter checkpoint: `embedder.model.*` holds the image tower and the
leftovers of a text tower that nothing uses, `cond_stage_model.model.*` the text tower.

Sizes are found from the weights. The width of the heads is that of OpenCLIP's model of that size
(80 for ViT-H, 64 for most), the activation the exact GELU; OpenAI's weights need their config.
"""

from collections.abc import Container, Mapping
from typing import Any

from convert.engine import found
from convert.engine.plan import Kind
from convert.engine.rules import (
    CONV2D,
    LINEAR,
    Rule,
    Rules,
    Skip,
    affine,
    defaulted,
    dense,
    prefixed,
)
from dicode_jax.models import clip

FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # the better one first
_BLOCK = r"transformer\.resblocks\.(\d+)\."
BLOCK_RULES: Rules = (
    *affine(_BLOCK + r"ln_(1|2)", "blocks.{0}.norm{1}"),
    Rule(_BLOCK + r"attn\.in_proj_weight", "blocks.{0}.attn.to_qkv.kernel", LINEAR),
    Rule(_BLOCK + r"attn\.in_proj_bias", "blocks.{0}.attn.to_qkv.bias"),
    *dense(_BLOCK + r"attn\.out_proj", "blocks.{0}.attn.to_out"),
    *dense(_BLOCK + r"mlp\.c_fc", "blocks.{0}.mlp.up"),
    *dense(_BLOCK + r"mlp\.c_proj", "blocks.{0}.mlp.down"),
)

# Keys of the image tower without their `visual.`.
_VISION: Rules = (
    Rule(r"conv1\.weight", "patch_embed.kernel", CONV2D),
    Rule(r"class_embedding", "class_embed"),
    Rule(r"positional_embedding", "pos_embed"),
    *affine(r"ln_(pre|post)", "norm_{0}"),
    Rule(r"proj", "proj.kernel"),  # applied as x @ proj: already [in, out]
    *BLOCK_RULES,
)
_TEXT: Rules = (
    Rule(r"token_embedding\.weight", "token_embed"),
    Rule(r"positional_embedding", "pos_embed"),
    *affine(r"ln_final", "norm_final"),
    Rule(r"text_projection", "proj.kernel"),  # applied as x @ proj: already [in, out]
    *BLOCK_RULES,
)
_BUFFERS: Rules = (Skip(r"attn_mask", why="causal mask buffer"),)

VISION_RULES: Rules = (
    *prefixed(_VISION, "visual."),
    Skip(
        r"(?:token_embedding\.weight|positional_embedding|ln_final\..*|text_projection)",
        why="left over from the text tower: an image embedder never uses it",
    ),
    Skip(r"logit_scale", why="temperature of the contrastive loss, not part of a tower"),
    Skip(r"transformer\..*", why="text tower, not part of the image tower"),
    *_BUFFERS,
)
TEXT_RULES: Rules = (
    *_TEXT,
    Skip(r"logit_scale", why="temperature of the contrastive loss, not part of a tower"),
    Skip(r"visual\..*", why="image tower, not part of the text tower"),
    *_BUFFERS,
)
CLIP_RULES: Rules = (
    *prefixed(_VISION, "visual.", "vision."),
    *prefixed(_TEXT, "", "text."),
    Rule(r"logit_scale", "logit_scale"),
    *_BUFFERS,
)

# Options of open_clip that change the architecture, with the value that leaves it as it is here.
_NEUTRAL = {
    "ls_init_value": None,
    "final_ln_after_pool": False,
    "output_tokens": False,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
}
_NEUTRAL_VISION = _NEUTRAL | {
    "patch_dropout": 0.0,
    "attentional_pool": False,
    "global_average_pool": False,
    "input_patchnorm": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "pool_type": "tok",
    "timm_model_name": None,
}
_NEUTRAL_TEXT = _NEUTRAL | {
    "embed_cls": False,
    "pad_id": 0,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_type": "linear",
    "proj_bias": False,
    "hf_model_name": None,
}
# Original name -> (our name, the original's default).
_SHARED = {"mlp_ratio": ("mlp_ratio", 4.0), "layers": ("num_layers", 12)}
_VISION_SIZES = _SHARED | {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "width": ("embed_dim", 768),
}
_TEXT_SIZES = _SHARED | {
    "context_length": ("max_seq_len", 77),
    "vocab_size": ("vocab_size", 49408),
    "width": ("embed_dim", 512),
    "heads": ("num_heads", 8),
}
# The same sizes in one flat mapping: name -> where it stands in the nested one.
_FLAT = {
    "image_size": ("vision_cfg", "image_size"),
    "patch_size": ("vision_cfg", "patch_size"),
    "vision_width": ("vision_cfg", "width"),
    "vision_layers": ("vision_cfg", "layers"),
    "vision_head_width": ("vision_cfg", "head_width"),
    "context_length": ("text_cfg", "context_length"),
    "vocab_size": ("text_cfg", "vocab_size"),
    "text_width": ("text_cfg", "width"),
    "text_layers": ("text_cfg", "layers"),
    "text_heads": ("text_cfg", "heads"),
}


def config_from_original(config: Mapping[str, Any] | clip.CLIPConfig) -> clip.CLIPConfig:
    """Reads an open_clip model configuration (`{embed_dim, vision_cfg, text_cfg[, quick_gelu]}`).

    The same sizes in one flat mapping (`vision_width`, `text_width`, ...) are accepted too.

    Raises:
        ValueError: an option is unknown, or has a value that would change the architecture.
    """
    if isinstance(config, clip.CLIPConfig):
        return config
    if "vision_cfg" not in config:
        config = _nested(config)
    _reject_unknown(
        config, {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}, {"custom_text": False}
    )
    vision, text = config["vision_cfg"], config["text_cfg"]
    _reject_unknown(vision, {*_VISION_SIZES, "head_width"}, _NEUTRAL_VISION)
    _reject_unknown(text, _TEXT_SIZES, _NEUTRAL_TEXT)
    both = {
        "output_dim": config["embed_dim"],
        "activation": "quick_gelu" if config.get("quick_gelu") else "gelu",
    }
    sizes = defaulted(vision, _VISION_SIZES)
    sizes["num_heads"] = sizes["embed_dim"] // vision.get("head_width", 64)
    return clip.CLIPConfig(
        vision=clip.CLIPVisionConfig(**sizes, **both),
        text=clip.CLIPTextConfig(**defaulted(text, _TEXT_SIZES), **both),
    )


def _reject_unknown(
    config: Mapping[str, Any], known: Container[str], neutral: Mapping[str, Any]
) -> None:
    for name, value in config.items():
        if name in known:
            continue
        if name not in neutral:
            raise ValueError(f"unknown option of a CLIP configuration: {name} = {value!r}")
        if value != neutral[name]:
            raise ValueError(
                f"{name} = {value!r} is not supported for CLIP: only {neutral[name]!r} is"
            )


def _nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a flat one."""
    _reject_unknown(config, {*_FLAT, "embed_dim", "gelu"}, {})
    if missing := {*_FLAT, "embed_dim"} - set(config):
        raise ValueError(f"a CLIP configuration lacks {', '.join(sorted(missing))}")
    gelu = config.get("gelu", "exact erf")
    if gelu not in ("exact erf", "quick"):
        raise ValueError(f"gelu must be 'exact erf' or 'quick', got {gelu!r}")
    out: dict[str, Any] = {"vision_cfg": {}, "text_cfg": {}}
    for name, (tower, size) in _FLAT.items():
        out[tower][size] = config[name]
    return out | {"embed_dim": config["embed_dim"], "quick_gelu": gelu == "quick"}


TOWERS = Kind(clip.CLIP, clip.CLIPConfig, config_from_original, lambda source, cfg: CLIP_RULES)
VISION = Kind(  # what belongs to a text tower is skipped, and the other way round
    clip.CLIPVision,
    clip.CLIPVisionConfig,
    lambda config: config_from_original(config).vision,
    lambda source, cfg: VISION_RULES,
)
TEXT = Kind(
    clip.CLIPText,
    clip.CLIPTextConfig,
    lambda config: config_from_original(config).text,
    lambda source, cfg: TEXT_RULES,
)


def find_config(source: Mapping[str, Any], given: clip.CLIPConfig | None = None) -> found.Found:
    """The configuration of a whole OpenCLIP state dict, from its keys and shapes.

    Args:
      source: Original keys.
      given: Tells what weights do not: heads and activation.

    Raises:
      UserError: Keys are missing, or the shapes make no CLIP.
    """
    keys = found.Keys(source)
    vision = found.clip_vision(keys.below("visual."), given and given.vision)
    text = found.clip_text(keys, given and given.text)
    return found.found(clip.CLIPConfig, {"vision": vision, "text": text})
