"""T5 encoder weights from Hugging Face: T5 v1.1 and flan-T5, as an encoder or a whole model.

Written against transformers 5.23. Of a whole model the decoder and the output matrix are skipped.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.engine.plan import blank, plan
from convert.engine.rules import LINEAR, ConversionError, Rule, Rules, Skip
from convert.parts.hugging_face import compare_head
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
    "model_type": "t5",
}
# Options without any effect on the encoder's output.
_IGNORED = {
    "architectures",
    "classifier_dropout",
    "decoder_start_token_id",
    "dropout_rate",
    "dtype",
    "eos_token_id",
    "initializer_factor",
    "is_encoder_decoder",
    "n_positions",
    "num_decoder_layers",
    "output_past",
    "pad_token_id",
    "task_specific_params",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "_name_or_path",
}


def config_from_original(config: Mapping[str, Any]) -> T5EncoderConfig:
    """Reads a Hugging Face `config.json` (or the part of it a fixture carries).

    Raises:
      ValueError: An option is unknown or missing, or has a value that would change what is
        computed.
    """
    left = dict(config)
    for name, allowed in _NEUTRAL.items():
        if name in left and (value := left.pop(name)) != allowed:
            raise ValueError(f"{name}={value!r} is not supported; only {allowed!r} is")
    if missing := sorted(set(_NAMES) - set(left)):
        raise ValueError(f"missing option(s) of T5: {', '.join(missing)}")
    if unknown := sorted(set(left) - set(_NAMES) - _IGNORED):
        raise ValueError(f"unknown option(s) of T5: {', '.join(unknown)}")
    return T5EncoderConfig(**{ours: left[name] for name, ours in _NAMES.items()})


def from_torch(
    state_dict: Mapping[str, Any], config: Mapping[str, Any] | T5EncoderConfig
) -> T5Encoder:
    """The encoder from an original state dict; `config` is the original's or ours.

    Raises:
      ValueError: The config has an option that is not supported.
      ConversionError: Keys or shapes do not fit, or the encoder has a token table of its own.
    """
    cfg = config if dataclasses.is_dataclass(config) else config_from_original(config)
    if lines := compare_head(state_dict, "encoder.embed_tokens.weight", "shared.weight"):
        raise ConversionError(lines)
    stacked = ("blocks",) if cfg.scan_layers else ()
    return plan(state_dict, RULES, blank(T5Encoder, cfg), stacked=stacked).module()
