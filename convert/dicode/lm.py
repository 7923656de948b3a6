"""The language-model agent of DiCoDe: GPT-2, both MLPs, the tables of keyframes and places.

Written against the release's `ContinuousLVLMSimple`. Its frozen `pre_input_resampler` is the
tokenizer's half and no part of our model: `resampler_from_torch` reads it.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from convert.engine.plan import Kind, below
from convert.engine.rules import DROP0, Layout, Rule, Rules, Skip, dense, prefixed, to_numpy
from convert.parts import gpt2, hugging_face, llama, resampler
from dicode_jax.config import without_retired
from dicode_jax.models.causal_lm import BodyConfig
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.llama import LlamaConfig

_DROP1 = Layout("drop1", drop=(1,))  # [m, 1, d] -> [m, d]
RESAMPLER_PREFIX = "pre_input_resampler."

_AGENT: Rules = (
    *dense(r"input_resampler\.0", "input_mlp.up"),
    *dense(r"input_resampler\.2", "input_mlp.down"),
    *dense(r"output_resampler\.0", "output_mlp.up"),
    *dense(r"output_resampler\.2", "output_mlp.down"),
    Rule(r"video_pos_token\.frame_token", "frame_embed", _DROP1),
    Rule(r"video_pos_token\.pos_token", "place_embed", DROP0),
    Skip(r"pre_normalizer", why="a constant, kept in the config"),
    Skip(r"pre_input_resampler\..*", why="frozen tokenizer half, see resampler_from_torch"),
)


def rules(body: BodyConfig) -> Rules:
    """The table for a body of GPT-2 or Llama."""
    table = llama.rules(body) if isinstance(body, LlamaConfig) else gpt2.RULES
    return (*prefixed(table, "llm.", "body."), *_AGENT)


RULES: Rules = (*prefixed(gpt2.RULES, "llm.", "body."), *_AGENT)
"""The table of the released agent, whose body is GPT-2."""

# Constructor argument of the original -> (our field, value when it is absent: the released
# agent's).
_OPTIONS = {
    "loss_func": ("loss", "gmm"),
    "num_gmm_kernel": ("num_mixtures", 16),
    "loss_reduction": ("loss_reduction", "mean"),
    "gmm_with_mse_and_l1": ("gmm_with_mse_and_l1", False),
    "balance_loss": ("balance_samples", False),
    "llm_loss_weight": ("llm_loss_weight", 0.0),
    "rec_loss_weight": ("rec_loss_weight", 0.0),
    "llm_rec_loss_weight": ("llm_rec_loss_weight", 1.0),
}
# What changes nothing here: names of classes, logging, parts that are read from the weights or
# elsewhere.
_IGNORED = {
    "_target_",
    "log_norms",
    "pre_input_resampler",
    "input_resampler",
    "output_resampler",
    "vae_kl_loss_scale",  # read by loss `vae` alone, which is gone
}
_NUM_SPECIAL = 66  # `</img>`, `<img>` and 64 query tokens follow the base vocabulary


def config_from_original(
    config: Mapping[str, Any] | DiCoDeLMConfig, state_dict: Mapping[str, Any] | None = None
) -> DiCoDeLMConfig:
    """Reads `{"gpt2": ..., "agent": ..., "special_ids": ...}`.

    Args:
      config: `gpt2` is a Hugging Face config, `agent` the original constructor's arguments (plus
        `deep_token_dim` and `mlp_hidden`, which the original takes from its sub-modules),
        `special_ids` the ids of `boi` and `pad`.
      state_dict: Gives the widths that `config` does not name, and a stored `pre_normalizer`.

    Raises:
      ValueError: An option is unknown or cannot be honoured, or a width is nowhere to be found.
    """
    if isinstance(config, DiCoDeLMConfig):
        return config
    body = gpt2.config_from_original(config["gpt2"])
    agent = dict(config["agent"])
    values = {ours: agent.pop(name, default) for name, (ours, default) in _OPTIONS.items()}
    if agent.pop("use_cosine_loss", False) and values["loss"] != "cosine":
        raise ValueError(f"use_cosine_loss needs loss_func 'cosine', got {values['loss']!r}")
    num_tokens = agent.pop("num_img_tokens", 16)
    normalizer = agent.pop("pre_normalizer", None)
    if normalizer is None and "pre_normalizer" in (state_dict or {}):
        normalizer = to_numpy(state_dict["pre_normalizer"]).reshape(-1).tolist()
    ids = dict(config.get("special_ids", {}))
    cfg = DiCoDeLMConfig(
        body=body,
        num_tokens=num_tokens,
        token_dim=_width(agent.pop("deep_token_dim", None), state_dict, "input_resampler.0", 1),
        mlp_dim=_width(agent.pop("mlp_hidden", None), state_dict, "input_resampler.0", 0),
        max_keyframes=agent.pop("max_length", 512) // num_tokens,
        pre_normalizer=None if normalizer is None else tuple(normalizer),
        image_token_id=ids.get("boi", body.vocab_size - _NUM_SPECIAL + 1),
        pad_token_id=ids.get("pad", body.vocab_size - _NUM_SPECIAL - 1),
        **without_retired(DiCoDeLMConfig, values),
    )
    if unknown := set(agent) - _IGNORED:
        raise ValueError(f"unknown option(s) of the agent: {', '.join(sorted(unknown))}")
    return cfg


def _width(value: int | None, state_dict, layer: str, axis: int) -> int:
    """A width as configured, else as the weight `[out, in]` of a layer has it."""
    if value is not None:
        return value
    if state_dict is None or f"{layer}.weight" not in state_dict:
        raise ValueError(f"the width of {layer} is neither in the config nor in the weights")
    return tuple(state_dict[f"{layer}.weight"].shape)[axis]


def untied_head(source: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line when the output matrix is not the token table."""
    llm = f"{prefix}llm."
    return hugging_face.compare_head(source, f"{llm}lm_head.weight", f"{llm}transformer.wte.weight")


KIND = Kind(
    DiCoDeLM,
    DiCoDeLMConfig,
    config_from_original,
    lambda source, cfg: rules(cfg.body),
    lambda source, cfg: untied_head(source),
)


def from_torch(
    state_dict: Mapping[str, Any], config: Mapping[str, Any] | DiCoDeLMConfig
) -> nnx.Module:
    """The language model from the agent's state dict (without the prefix `llm_agent.`).

    Raises:
      ValueError: The config has an option that is not supported.
      ConversionError: Keys or shapes do not fit, or the output matrix is not tied.
    """
    return KIND(state_dict, config_from_original(config, state_dict))


def resampler_from_torch(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> nnx.Module:
    """The agent's frozen `pre_input_resampler`; `config` as in `config_from_original`."""
    own = below(state_dict, RESAMPLER_PREFIX)
    return resampler.KIND(own, config["agent"]["pre_input_resampler"])
