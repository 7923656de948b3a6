"""LanDiff's semantic tokenizer: `tokenizer/model.safetensors` of the release, 319 keys.

A copy lies in the release's file of the diffusion model, below `COPY`. What the weights do not tell
is the release's: the grid, the frames of a segment and the width of a head.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.engine import found
from convert.engine.plan import Kind
from convert.engine.rules import (
    CONV1X1,
    DROP0,
    LINEAR,
    Rule,
    Rules,
    Skip,
    affine,
    dense,
)
from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizer, SemanticTokenizerConfig

COPY = "semantic_conditioner.semantic_model.model."
CODES, AVERAGES = "quantizer._codebook.embed", "quantizer._codebook.embed_avg"
HEAD_DIM = 64


def _side(side: str) -> tuple[Rule, ...]:
    block, ours = rf"{side}\.transformer\.(\d+)", f"{side}.transformer.blocks.{{0}}"
    return (
        *affine(rf"{side}\.ln_(pre|post)", f"{side}.transformer.norm_{{0}}"),
        *affine(rf"{block}\.ln_1", f"{ours}.attn_norm"),
        Rule(rf"{block}\.attn\.w(q|k|v)\.weight", f"{ours}.attn.{{1}}.kernel", LINEAR),
        Rule(rf"{block}\.attn\.wo\.weight", f"{ours}.attn.out.kernel", LINEAR),
        *affine(rf"{block}\.ln_2", f"{ours}.mlp_norm"),
        *dense(rf"{block}\.mlp\.c_fc", f"{ours}.mlp.up"),
        *dense(rf"{block}\.mlp\.c_proj", f"{ours}.mlp.down"),
    )


RULES: Rules = (
    Rule(r"encoder\.IFrame_latent_tokens", "encoder.iframe_queries"),
    Rule(r"encoder\.PFrame_latent_tokens", "encoder.pframe_queries"),
    *dense(r"encoder\.patch_embed", "encoder.feature_embed", CONV1X1),
    *_side("encoder"),
    *dense(r"encoder\.proj_out", "encoder.head"),
    *dense(r"decoder\.decoder_embed", "decoder.token_embed"),
    Rule(r"decoder\.mask_token", "decoder.mask_token", DROP0),
    *_side("decoder"),
    *dense(r"decoder\.ffn\.0", "decoder.head_in"),
    *dense(r"decoder\.ffn\.2", "decoder.head_out"),
    *dense(r"quantizer\.project_(in|out)", "quantizer.project_{0}"),
    Rule(r"quantizer\._codebook\.embed", "quantizer.codes", DROP0),
    Skip(
        r"quantizer\._codebook\.(?:initted|cluster_size|embed_avg)",
        why="averages of a training, which starts anew from the codes",
    ),
    Skip(r"(?:mean|std)", why="statistics of features, which the release never applies"),
)


def find_config(source: Mapping[str, Any]) -> found.Found:
    """Sizes by shapes.

    Raises:
      UserError: It is no such tokenizer.
    """
    keys = found.Keys(source)
    iframe, width = keys.shape("encoder.IFrame_latent_tokens", 2)
    _, codes, code_dim = keys.shape("quantizer._codebook.embed", 3)
    told = {
        "frames": found.found(
            FrameTokens,
            {"iframe": iframe, "pframe": keys.shape("encoder.PFrame_latent_tokens", 2)[0]},
        ),
        "feature_dim": keys.shape("encoder.patch_embed.weight", 4)[1],
        "embed_dim": width,
        "num_layers": keys.count("encoder.transformer."),
        "token_dim": keys.shape("encoder.proj_out.weight", 2)[0],
        "codebook_size": codes,
        "code_dim": code_dim,
    }
    heads = found.heads(width, HEAD_DIM, "encoder.IFrame_latent_tokens")
    return found.found(SemanticTokenizerConfig, told, {"num_heads": heads})


def stored_beside(cfg: SemanticTokenizerConfig) -> dict[str, np.ndarray]:
    """What the original stores beside its parameters, such that a code is its own average."""
    ones = np.ones((1, cfg.codebook_size), np.float32)
    return {
        "mean": np.zeros(cfg.feature_dim, np.float32),
        "std": np.ones(cfg.feature_dim, np.float32),
        "quantizer._codebook.initted": np.ones(1, np.float32),
        "quantizer._codebook.cluster_size": ones,
    }


KIND = Kind(
    SemanticTokenizer,
    SemanticTokenizerConfig,
    lambda config: SemanticTokenizerConfig(**config),
    lambda source, cfg: RULES,
)
