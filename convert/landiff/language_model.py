"""LanDiff's language model: `llm/model.safetensors` of the release, 185 keys.

Its text encoder, flan-T5 XXL, lies apart (`convert.parts.t5`). What the weights do not tell is the
release's: the width of a head and the tokens of a frame.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.engine import found
from convert.engine.plan import Kind
from convert.engine.rules import LINEAR, Rule, Rules, Split, affine, dense
from dicode_jax.models.landiff.language_model import (
    MARKS,
    RELEASED_BODY,
    LanguageModel,
    LanguageModelConfig,
)
from dicode_jax.models.llama import LlamaConfig

HEAD_DIM = 128
_BLOCK, _OURS = r"transformer\.blocks\.(\d+)", "body.blocks.{0}"

RULES: Rules = (
    Rule(r"visual_embedding_model\.tok_emb_code\.weight", "body.token_embed.embedding"),
    Rule(rf"{_BLOCK}\.norm0\.weight", f"{_OURS}.attn_norm.scale"),
    Split(
        rf"{_BLOCK}\.wqkv\.weight",
        tuple(f"{_OURS}.attn.{name}.kernel" for name in "qkv"),
        layout=LINEAR,
    ),
    Rule(rf"{_BLOCK}\.wo\.weight", f"{_OURS}.attn.out.kernel", LINEAR),
    Rule(rf"{_BLOCK}\.norm1\.weight", f"{_OURS}.mlp_norm.scale"),
    Rule(rf"{_BLOCK}\.mlp\.w1\.weight", f"{_OURS}.mlp.gate.kernel", LINEAR),
    Rule(rf"{_BLOCK}\.mlp\.w3\.weight", f"{_OURS}.mlp.up.kernel", LINEAR),
    Rule(rf"{_BLOCK}\.mlp\.w2\.weight", f"{_OURS}.mlp.down.kernel", LINEAR),
    *affine(r"transformer\.layer_norm", "body.final_norm"),
    Rule(r"transformer\.head\.weight", "body.head.kernel", LINEAR),
    *dense(r"cond_model\.embeddings\.fc0", "text_in"),
    *dense(r"cond_model\.embeddings\.fc1", "text_out"),
    Rule(r"cond_model\.null_text_embedding", "null_text"),
    *dense(r"micro_condition\.mlps\.frames\.0", "num_frames.first"),
    *dense(r"micro_condition\.mlps\.frames\.2", "num_frames.last"),
    *dense(r"micro_condition\.mlps\.motion_score\.0", "motion_score.first"),
    *dense(r"micro_condition\.mlps\.motion_score\.2", "motion_score.last"),
)


def find_config(source: Mapping[str, Any]) -> found.Found:
    """Sizes by shapes.

    Raises:
      UserError: It is no such model.
    """
    keys = found.Keys(source)
    vocabulary, width = keys.shape("visual_embedding_model.tok_emb_code.weight", 2)
    heads = found.heads(width, HEAD_DIM, "tok_emb_code")
    body = {
        "num_layers": keys.count("transformer.blocks."),
        "embed_dim": width,
        "mlp_dim": keys.shape("transformer.blocks.0.mlp.w1.weight", 2)[0],
        "vocab_size": vocabulary,
    }
    rest = {f.name: getattr(RELEASED_BODY, f.name) for f in dataclasses.fields(LlamaConfig)}
    rest |= {"num_heads": heads, "num_kv_heads": heads}
    fixed = {name: value for name, value in rest.items() if name not in body}
    micro = keys.shape("micro_condition.mlps.frames.0.weight", 2)
    told = {
        "body": found.found(LlamaConfig, body, fixed),
        "codebook_size": vocabulary - len(MARKS),
        "text_dim": keys.shape("cond_model.embeddings.fc0.weight", 2)[1],
        "micro_dim": micro[0],
        "sinusoid_dim": micro[1],
    }
    return found.found(LanguageModelConfig, told)


KIND = Kind(
    LanguageModel,
    LanguageModelConfig,
    lambda config: LanguageModelConfig(**config),
    lambda source, cfg: RULES,
)
