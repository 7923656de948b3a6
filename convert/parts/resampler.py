"""Perceiver resamplers and linear image projections of DynamiCrafter and DiCoDe.

Written against `resampler.py` of both (the language model's copy has `no_norm_out` instead of
`use_norm_out`, and a `normalizer` that its forward pass never uses).
"""

from collections.abc import Mapping
from typing import Any

from convert.engine.plan import Kind
from convert.engine.rules import DROP0, LINEAR, Rule, Rules, Skip, affine, defaulted, dense
from dicode_jax.config import without_retired
from dicode_jax.nn.resampler import LinearImageProjection, Resampler, ResamplerConfig

RULES: Rules = (
    Rule(r"latents", "latents", DROP0),
    Rule(r"(proj_in|proj_out)\.weight", "{0}.kernel", LINEAR),
    Rule(r"(proj_in|proj_out|norm_out)\.bias", "{0}.bias"),
    Rule(r"norm_out\.weight", "norm_out.scale"),
    *dense(r"final_proj_out", "final_proj"),
    *affine(r"layers\.(\d+)\.0\.norm1", "blocks.{0}.attn.norm_features"),
    *affine(r"layers\.(\d+)\.0\.norm2", "blocks.{0}.attn.norm_latents"),
    Rule(r"layers\.(\d+)\.0\.(to_q|to_kv|to_out)\.weight", "blocks.{0}.attn.{1}.kernel", LINEAR),
    *affine(r"layers\.(\d+)\.1\.0", "blocks.{0}.ff.norm"),
    Rule(r"layers\.(\d+)\.1\.1\.weight", "blocks.{0}.ff.up.kernel", LINEAR),
    Rule(r"layers\.(\d+)\.1\.3\.weight", "blocks.{0}.ff.down.kernel", LINEAR),
    Skip(r"normalizer", why="a parameter that the original's forward pass never uses"),
)

IMAGE_PROJ_RULES: Rules = (
    *dense(r"proj", "proj"),
    *affine(r"norm", "norm"),
)

# Original name -> (our name, the original's default).
_SIZES = {
    "dim": ("dim", 1024),
    "depth": ("depth", 8),
    "dim_head": ("head_dim", 64),
    "heads": ("num_heads", 16),
    "num_queries": ("num_queries", 8),
    "embedding_dim": ("embed_dim", 768),
    "output_dim": ("output_dim", 1024),
    "ff_mult": ("ff_mult", 4),
    "video_length": ("video_length", None),
    "extra_self_attn": ("extra_self_attn", False),
    "extra_output_proj": ("extra_output_proj", False),
    "use_cosine": ("use_cosine", False),
    "use_norm_out": ("use_norm_out", True),
}
_OTHER = {"output_shape", "no_norm_out", "normalizer", "pretrained_model_path"}


def config_from_original(config: Mapping[str, Any] | ResamplerConfig) -> ResamplerConfig:
    """Reads the constructor arguments of an original `Resampler` (or `{target, params}`).

    Raises:
        ValueError: an option is unknown, or gone (`OptionGone`).
    """
    if isinstance(config, ResamplerConfig):
        return config
    config = _params(config)
    if unknown := set(config) - set(_SIZES) - _OTHER:
        raise ValueError(f"unknown option(s) of a resampler: {', '.join(sorted(unknown))}")
    values = defaulted(config, _SIZES)
    if config.get("no_norm_out"):
        values["use_norm_out"] = False
    if (shape := config.get("output_shape")) is not None:
        c, h, w = shape
        values["output_shape"] = (h, w, c)
    return ResamplerConfig(**without_retired(ResamplerConfig, values))


def _image_proj_sizes(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The sizes of a `LinearImageProjection` of an original `ImageProjModel`."""
    config = _params(config)
    names = {
        "clip_embeddings_dim": 1024,
        "cross_attention_dim": 1024,
        "clip_extra_context_tokens": 4,
    }
    if unknown := set(config) - set(names):
        raise ValueError(f"unknown option(s) of an image projection: {', '.join(sorted(unknown))}")
    return tuple(config.get(name, default) for name, default in names.items())


def _params(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("params", {}) if "target" in config else config


KIND = Kind(Resampler, ResamplerConfig, config_from_original, lambda source, cfg: RULES)
IMAGE_PROJ = Kind(
    lambda sizes, rngs: LinearImageProjection(*sizes, rngs=rngs),
    tuple,
    _image_proj_sizes,
    lambda source, cfg: IMAGE_PROJ_RULES,
)
