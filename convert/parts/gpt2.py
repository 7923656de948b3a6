"""GPT-2 weights from Hugging Face: the `transformer.` layout and the hub files' layout without
prefix.

Written against transformers 4.45 and 5.23. The linear layers are `Conv1D`, stored `[in, out]`: they
are kept as they are.
"""

import functools
from typing import Any

from convert.engine.plan import Kind
from convert.engine.rules import KEEP, Rule, Rules, Skip, affine, dense
from convert.parts import hugging_face
from dicode_jax.models.gpt2 import GPT2, GPT2Config

_PREFIX = r"(?:transformer\.)?"

RULES: Rules = (
    Rule(rf"{_PREFIX}wte\.weight", "token_embed.embedding"),
    Rule(rf"{_PREFIX}wpe\.weight", "position_embed.embedding"),
    *affine(rf"{_PREFIX}h\.(\d+)\.ln_1", "blocks.{0}.attn_norm"),
    *affine(rf"{_PREFIX}h\.(\d+)\.ln_2", "blocks.{0}.mlp_norm"),
    *dense(rf"{_PREFIX}h\.(\d+)\.attn\.c_attn", "blocks.{0}.attn.qkv", KEEP),
    *dense(rf"{_PREFIX}h\.(\d+)\.attn\.c_proj", "blocks.{0}.attn.out", KEEP),
    *dense(rf"{_PREFIX}h\.(\d+)\.mlp\.c_fc", "blocks.{0}.mlp.up", KEEP),
    *dense(rf"{_PREFIX}h\.(\d+)\.mlp\.c_proj", "blocks.{0}.mlp.down", KEEP),
    *affine(rf"{_PREFIX}ln_f", "final_norm"),
    Skip(rf"{_PREFIX}h\.\d+\.attn\.bias", why="causal mask buffer"),
    Skip(rf"{_PREFIX}h\.\d+\.attn\.masked_bias", why="mask value buffer"),
    Skip(r"lm_head\.weight", why="tied to the token embedding"),
)

# Options of the original that change what is computed: only these values are supported.
_NEUTRAL = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "model_type": "gpt2",
}
_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
# Options without any effect on hidden states and logits.
_IDLE = {
    "initializer_range",
    "bos_token_id",
    "reorder_and_upcast_attn",
    "task_specific_params",
    "n_ctx",
    "output_past",
    "return_dict",
    "gradient_checkpointing",
}


def _take(left: dict[str, Any]) -> GPT2Config:
    """The configuration of options that are taken out of `left`."""
    take = left.pop
    activations = [left.pop(k) for k in ("activation_function", "activation") if k in left]
    for activation in activations:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is not supported; GPT-2 uses 'gelu_new'")
    rates = {k: left.pop(k) for k in ("resid_pdrop", "embd_pdrop", "attn_pdrop") if k in left}
    if len(set(rates.values())) > 1:
        raise ValueError(f"the three dropout rates must be equal, got {rates}")
    for name in [name for name in left if name.startswith("summary_")]:
        del left[name]
    embed_dim, mlp_dim = take("n_embd"), take("n_inner", None)
    return GPT2Config(
        num_layers=take("n_layer"),
        num_heads=take("n_head"),
        embed_dim=embed_dim,
        max_seq_len=take("n_positions"),
        vocab_size=take("vocab_size"),
        mlp_dim=None if mlp_dim == 4 * embed_dim else mlp_dim,
        dropout=next(iter(rates.values()), 0.0),
        layer_norm_eps=take("layer_norm_epsilon", 1e-5),
    )


config_from_original = functools.partial(
    hugging_face.read_options, title="GPT-2", neutral=_NEUTRAL, idle=_IDLE, take=_take
)
TABLES = ("transformer.wte.weight", "wte.weight")
KIND = Kind(
    GPT2,
    GPT2Config,
    config_from_original,
    lambda source, cfg: RULES,
    lambda source, cfg: hugging_face.untied_head(source, TABLES),
)
FAMILY = hugging_face.Family(name="gpt2", title="GPT-2", kind=KIND, tables=TABLES)
