"""OpenCLIP checkpoints (`open_clip_pytorch_model.bin` and its parts) to the two CLIP towers.

Written against open_clip 2.22 and 3.3, which share key names. The same tables serve the two partial
copies in a DiCoDe or DynamiCrafter checkpoint: `embedder.model.*` holds the image tower and the
leftovers of a text tower that nothing uses, `cond_stage_model.model.*` the text tower.

Sizes are found from the weights. The width of the heads is that of OpenCLIP's model of that size
(80 for ViT-H, 64 for most), the activation the exact GELU; OpenAI's weights need their config.
"""

from collections.abc import Mapping
from typing import Any

from convert.engine import found
from convert.engine.plan import Plan, blank, plan
from convert.engine.rules import CONV2D, LINEAR, Rule, Rules, Skip, affine, dense, prefixed
from dicode_jax.models.clip import (
    CLIP,
    CLIPConfig,
    CLIPText,
    CLIPTextConfig,
    CLIPVision,
    CLIPVisionConfig,
)

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
_NEUTRAL_VISION = {
    "ls_init_value": None,
    "patch_dropout": 0.0,
    "attentional_pool": False,
    "global_average_pool": False,
    "input_patchnorm": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "pool_type": "tok",
    "final_ln_after_pool": False,
    "output_tokens": False,
    "timm_model_name": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
}
_NEUTRAL_TEXT = {
    "ls_init_value": None,
    "embed_cls": False,
    "pad_id": 0,
    "no_causal_mask": False,
    "final_ln_after_pool": False,
    "pool_type": "argmax",
    "proj_type": "linear",
    "proj_bias": False,
    "output_tokens": False,
    "hf_model_name": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
}
_FLAT_NAMES = {
    "image_size",
    "patch_size",
    "vision_width",
    "vision_layers",
    "vision_head_width",
    "embed_dim",
    "text_width",
    "text_layers",
    "text_heads",
    "context_length",
    "vocab_size",
    "gelu",
}


def config_from_original(config: Mapping[str, Any] | CLIPConfig) -> CLIPConfig:
    """Reads an open_clip model configuration (`{embed_dim, vision_cfg, text_cfg[, quick_gelu]}`).

    The same sizes in one flat mapping (`vision_width`, `text_width`, ...) are accepted too.

    Raises:
        ValueError: an option is unknown, or has a value that would change the architecture.
    """
    if isinstance(config, CLIPConfig):
        return config
    if "vision_cfg" not in config:
        config = _unflatten(config)
    _reject_unknown(
        config, {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}, {"custom_text": False}
    )
    vision, text, width = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    _reject_unknown(
        vision,
        {"image_size", "patch_size", "layers", "width", "head_width", "mlp_ratio"},
        _NEUTRAL_VISION,
    )
    _reject_unknown(
        text,
        {"context_length", "vocab_size", "layers", "width", "heads", "mlp_ratio"},
        _NEUTRAL_TEXT,
    )
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    return CLIPConfig(
        vision=CLIPVisionConfig(
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 16),
            embed_dim=vision.get("width", 768),
            num_layers=vision.get("layers", 12),
            num_heads=vision.get("width", 768) // vision.get("head_width", 64),
            mlp_ratio=vision.get("mlp_ratio", 4.0),
            output_dim=width,
            activation=activation,
        ),
        text=CLIPTextConfig(
            max_seq_len=text.get("context_length", 77),
            vocab_size=text.get("vocab_size", 49408),
            embed_dim=text.get("width", 512),
            num_layers=text.get("layers", 12),
            num_heads=text.get("heads", 8),
            mlp_ratio=text.get("mlp_ratio", 4.0),
            output_dim=width,
            activation=activation,
        ),
    )


def plan_towers(source: Mapping[str, Any], cfg: CLIPConfig) -> Plan:
    """What goes where in both towers, by shapes alone."""
    return plan(source, CLIP_RULES, blank(CLIP, cfg))


def from_torch(state_dict: Mapping[str, Any], config: Any) -> CLIP:
    """Both towers from a whole OpenCLIP state dict."""
    return plan_towers(state_dict, config_from_original(config)).module()


def vision_from_torch(state_dict: Mapping[str, Any], config: Any) -> CLIPVision:
    """The image tower; what belongs to a text tower is skipped."""
    cfg = config if isinstance(config, CLIPVisionConfig) else config_from_original(config).vision
    return plan(state_dict, VISION_RULES, blank(CLIPVision, cfg)).module()


def text_from_torch(state_dict: Mapping[str, Any], config: Any) -> CLIPText:
    """The text tower; what belongs to an image tower is skipped."""
    cfg = config if isinstance(config, CLIPTextConfig) else config_from_original(config).text
    return plan(state_dict, TEXT_RULES, blank(CLIPText, cfg)).module()


def _reject_unknown(config: Mapping[str, Any], known: set[str], neutral: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name in known:
            continue
        if name not in neutral:
            raise ValueError(f"unknown option of a CLIP configuration: {name} = {value!r}")
        if value != neutral[name]:
            raise ValueError(
                f"{name} = {value!r} is not supported for CLIP: only {neutral[name]!r} is"
            )


def _unflatten(config: Mapping[str, Any]) -> dict[str, Any]:
    _reject_unknown(config, _FLAT_NAMES, {})
    if missing := _FLAT_NAMES - {"gelu"} - set(config):
        raise ValueError(f"a CLIP configuration lacks {', '.join(sorted(missing))}")
    gelu = config.get("gelu", "exact erf")
    if gelu not in ("exact erf", "quick"):
        raise ValueError(f"gelu must be 'exact erf' or 'quick', got {gelu!r}")
    return {
        "embed_dim": config["embed_dim"],
        "quick_gelu": gelu == "quick",
        "vision_cfg": {
            "image_size": config["image_size"],
            "patch_size": config["patch_size"],
            "width": config["vision_width"],
            "layers": config["vision_layers"],
            "head_width": config["vision_head_width"],
        },
        "text_cfg": {
            "context_length": config["context_length"],
            "vocab_size": config["vocab_size"],
            "width": config["text_width"],
            "layers": config["text_layers"],
            "heads": config["text_heads"],
        },
    }


def find_config(source: Mapping[str, Any], given: CLIPConfig | None = None) -> found.Found:
    """The configuration of a whole OpenCLIP state dict, from its keys and shapes.

    Args:
      source: Original keys.
      given: Tells what weights do not: heads and activation.

    Raises:
      UserError: Keys are missing, or the shapes make no CLIP.
    """
    keys = found.Keys(source)
    vision = {} if given is None else tower_hints(given.vision)
    text = {} if given is None else tower_hints(given.text)
    parts = {
        "vision": found.clip_vision(keys.below("visual."), **vision),
        "text": found.clip_text(keys, **text),
    }
    return found.found(CLIPConfig, parts)


def tower_hints(cfg: CLIPVisionConfig | CLIPTextConfig) -> dict[str, Any]:
    """What the weights of a tower do not tell, for `found.clip_vision` and `found.clip_text`."""
    return {
        "head_dim": cfg.embed_dim // cfg.num_heads,
        "mlp_ratio": cfg.mlp_ratio,
        "activation": cfg.activation,
    }
