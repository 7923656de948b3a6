"""T5 encoder weights from Hugging Face: T5 v1.1 and flan-T5, as an encoder or a whole model.

Written against transformers 5.23. Of a whole model the decoder and the output matrix are skipped.
"""

import functools
from typing import Any

from convert.engine.plan import Kind
from convert.engine.rules import LINEAR, Rule, Rules, Skip
from convert.parts import hugging_face
from dicode_jax.models.t5 import T5Encoder, T5EncoderConfig

_BLOCK = r"encoder\.block\.(\d+)"
_ATTENTION, _MLP = rf"{_BLOCK}\.layer\.0", rf"{_BLOCK}\.layer\.1"

RULES: Rules = (
    Rule(r"shared\.weight", "token_embed.embedding"),
    Rule(
        r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
        "position_bias",
    ),
    Rule(rf"{_ATTENTION}\.SelfAttention\.(q|k|v)\.weight", "blocks.{0}.attn.{1}.kernel", LINEAR),
    Rule(rf"{_ATTENTION}\.SelfAttention\.o\.weight", "blocks.{0}.attn.out.kernel", LINEAR),
    Rule(rf"{_ATTENTION}\.layer_norm\.weight", "blocks.{0}.attn_norm.scale"),
    Rule(rf"{_MLP}\.DenseReluDense\.wi_0\.weight", "blocks.{0}.mlp.gate.kernel", LINEAR),
    Rule(rf"{_MLP}\.DenseReluDense\.wi_1\.weight", "blocks.{0}.mlp.up.kernel", LINEAR),
    Rule(rf"{_MLP}\.DenseReluDense\.wo\.weight", "blocks.{0}.mlp.down.kernel", LINEAR),
    Rule(rf"{_MLP}\.layer_norm\.weight", "blocks.{0}.mlp_norm.scale"),
    Rule(r"encoder\.final_layer_norm\.weight", "final_norm.scale"),
    Skip(r"encoder\.embed_tokens\.weight", why="the same table as shared.weight"),
    Skip(r"decoder\..*|lm_head\.weight", why="not part of the encoder"),
)

_NAMES = {
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "d_model": "embed_dim",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
    "vocab_size": "vocab_size",
    "relative_attention_num_buckets": "num_buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "norm_eps",
}
# Options of the original that change what is computed: only these values are supported.
_NEUTRAL = {
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "dense_act_fn": "gelu_new",
    "is_decoder": False,
    "model_type": "t5",
}
# Options without any effect on the encoder's output.
_IDLE = {
    "classifier_dropout",
    "decoder_start_token_id",
    "dropout_rate",
    "initializer_factor",
    "is_encoder_decoder",
    "n_positions",
    "num_decoder_layers",
    "output_past",
    "scale_decoder_outputs",
    "task_specific_params",
    "tie_word_embeddings",
    "tokenizer_class",
}


def _take(left: dict[str, Any]) -> T5EncoderConfig:
    """The configuration of options that are taken out of `left`."""
    if missing := sorted(set(_NAMES) - set(left)):
        raise ValueError(f"missing option(s) of T5: {', '.join(missing)}")
    return T5EncoderConfig(**{ours: left.pop(name) for name, ours in _NAMES.items()})


config_from_original = functools.partial(
    hugging_face.read_options, title="T5", neutral=_NEUTRAL, idle=_IDLE, take=_take
)
KIND = Kind(
    T5Encoder,
    T5EncoderConfig,
    config_from_original,
    lambda source, cfg: RULES,
    lambda source, cfg: hugging_face.compare_head(
        source, "encoder.embed_tokens.weight", "shared.weight"
    ),
)
