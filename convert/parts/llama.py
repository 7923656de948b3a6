"""Llama weights from Hugging Face: Llama 3.2 1B and 3B, and others of that architecture.

Written against transformers 4.45 and 5.23. Its files hold queries and keys in the half-rotation
order that `nn.rotary` uses (Meta's own files interleave and are not read).
"""

import functools
from typing import Any

from convert.engine.plan import Kind
from convert.engine.rules import LINEAR, Rule, Rules, Skip
from convert.parts import hugging_face
from dicode_jax.models.llama import Llama, LlamaConfig
from dicode_jax.nn.rotary import RotaryScaling

_PREFIX = r"(?:model\.)?"
_LAYERS = rf"{_PREFIX}layers\.(\d+)"

RULES: Rules = (
    Rule(rf"{_PREFIX}embed_tokens\.weight", "token_embed.embedding"),
    Rule(rf"{_LAYERS}\.input_layernorm\.weight", "blocks.{0}.attn_norm.scale"),
    Rule(rf"{_LAYERS}\.self_attn\.(q|k|v)_proj\.weight", "blocks.{0}.attn.{1}.kernel", LINEAR),
    Rule(rf"{_LAYERS}\.self_attn\.o_proj\.weight", "blocks.{0}.attn.out.kernel", LINEAR),
    Rule(rf"{_LAYERS}\.post_attention_layernorm\.weight", "blocks.{0}.mlp_norm.scale"),
    Rule(rf"{_LAYERS}\.mlp\.(gate|up|down)_proj\.weight", "blocks.{0}.mlp.{1}.kernel", LINEAR),
    Rule(rf"{_PREFIX}norm\.weight", "final_norm.scale"),
    Skip(
        rf"{_LAYERS}\.self_attn\.rotary_emb\.inv_freq|{_PREFIX}rotary_emb\.inv_freq",
        why="rotary frequencies, computed from the config",
    ),
)
_TIED_HEAD = Skip(r"lm_head\.weight", why="tied to the token embedding")
_OWN_HEAD = Rule(r"lm_head\.weight", "head.kernel", LINEAR)

# Options of the original that change what is computed: only these values are supported.
_NEUTRAL = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "model_type": "llama",
}
# Options without any effect on hidden states and logits.
_IDLE = ("bos_token_id", "initializer_range")


def rules(cfg: LlamaConfig) -> Rules:
    """The table for a configuration: a tied head is skipped, one of its own is taken over."""
    return (*RULES, _TIED_HEAD if cfg.tie_embeddings else _OWN_HEAD)


def _take(left: dict[str, Any]) -> LlamaConfig:
    """The configuration of options that are taken out of `left`."""
    take = left.pop
    theta, scaling = _rope(left)
    num_heads, embed_dim = take("num_attention_heads"), take("hidden_size")
    head_dim = take("head_dim", None)
    return LlamaConfig(
        num_layers=take("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=take("num_key_value_heads", num_heads),
        embed_dim=embed_dim,
        head_dim=None if head_dim == embed_dim / num_heads else head_dim,
        mlp_dim=take("intermediate_size"),
        max_seq_len=take("max_position_embeddings"),
        vocab_size=take("vocab_size"),
        norm_eps=take("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=take("tie_word_embeddings", False),  # the original's default
    )


def _rope(left: dict[str, Any]) -> tuple[float, RotaryScaling | None]:
    """Takes the rotary options out, in the older (`rope_scaling`) or the newer form."""
    old, new = left.pop("rope_scaling", None), left.pop("rope_parameters", None)
    theta = left.pop("rope_theta", None)
    options = dict(new or old or {})
    theta = options.pop("rope_theta", theta)
    kind = options.pop("rope_type", options.pop("type", "default"))
    options.pop("type", None)
    if theta is None:
        raise ValueError("rope_theta is missing")
    if kind == "default" and not options:
        return float(theta), None
    names = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_seq_len",
    }
    if kind != "llama3" or set(options) != set(names):
        raise ValueError(
            f"rope scaling {kind!r} with {', '.join(sorted(options)) or 'no options'} is not "
            f"supported; 'llama3' with {', '.join(names)} is"
        )
    return float(theta), RotaryScaling(**{names[key]: value for key, value in options.items()})


config_from_original = functools.partial(
    hugging_face.read_options, title="Llama", neutral=_NEUTRAL, idle=_IDLE, take=_take
)
TABLES = ("model.embed_tokens.weight", "embed_tokens.weight")
KIND = Kind(
    Llama,
    LlamaConfig,
    config_from_original,
    lambda source, cfg: rules(cfg),
    lambda source, cfg: hugging_face.untied_head(source, TABLES) if cfg.tie_embeddings else (),
)
FAMILY = hugging_face.Family(name="llama", title="Llama", kind=KIND, tables=TABLES)
