"""A whole DiCoDe checkpoint: deep tokenizer, clip decoder and, where it is there, language model.

Written against the release's `LatentVisualDiffusion` (2535 keys without the agent, 3033 with GPT-2
large). The original loads with `strict=False` and would overlook any mismatch; here every key is
either used, skipped for a stated reason, or an error. A checkpoint brings its own noise-schedule
buffers: they are compared with those of the configuration, and a difference is an error too.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from convert.dicode import lm
from convert.dicode.config import SystemConfig, config_from_original
from convert.engine import plan as engine
from convert.engine.plan import below
from convert.engine.rules import ConversionError, to_numpy
from convert.parts import buffers, clip, deep_tokens
from dicode_jax.models.clip import CLIPText
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer

LANGUAGE_MODEL = "llm_agent."
BUFFERS = (*buffers.BUFFERS, "scale_factor")


class System(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      tokenizer: Keyframes to deep tokens.
      decoder: Deep tokens to clips; its constants are filled from the other parts.
      lm: Text to deep tokens, or None when the checkpoint has no agent.
    """

    tokenizer: DeepTokenizer
    decoder: ClipDecoder
    lm: DiCoDeLM | None


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Takes off what trainers put around a state dict, and renames one module of older files.

    Lightning's `state_dict`, deepspeed's `module` with keys under `_forward_module.`, the same
    without `module`, and DynamiCrafter's `framestride_embed`, which later became `fps_embedding`.
    """
    for key in ("state_dict", "module"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    head = "_forward_module."
    renamed = {key.removeprefix(head): value for key, value in state_dict.items()}
    return {k.replace("framestride_embed", "fps_embedding"): v for k, v in renamed.items()}


def from_torch(state_dict: Mapping[str, Any], config: Mapping[str, Any] | SystemConfig) -> System:
    """All parts of a whole checkpoint.

    Args:
      state_dict: Original key -> array, wrapped (see `unwrap`) or not.
      config: The original configuration, see `config_from_original`, or its parsed form.

    Raises:
      ValueError: The configuration has an option that is not supported, or lacks the agent's.
      ConversionError: Anything that does not fit, in all parts at once.
    """
    source, cfg = unwrap(state_dict), config_from_original(config)
    agent = below(source, LANGUAGE_MODEL)
    if agent and cfg.lm is None:
        raise ValueError("the checkpoint has a language model: give its `gpt2` and `agent` sizes")
    plans = deep_tokens.plan_system(source, cfg.tokenizer, cfg.decoder, cfg.text, cfg.text_layer)
    problems = stray_keys(source) + check_schedule(source, cfg.decoder) + plans.problems
    made = None
    if agent:
        made = lm.KIND.plan(source, lm.config_from_original(cfg.lm, agent), LANGUAGE_MODEL)
        problems += made.problems or lm.untied_head(source, LANGUAGE_MODEL)
    if problems:
        raise ConversionError(problems)
    return System(plans.tokenizer.module(), plans.decoder.module(), made and made.module())


def text_tower_from_torch(
    state_dict: Mapping[str, Any], config: Mapping[str, Any] | SystemConfig
) -> CLIPText:
    """The text tower of a checkpoint (`cond_stage_model`), used for the empty prompt alone."""
    source, cfg = unwrap(state_dict), config_from_original(config)
    return clip.TEXT.plan(source, cfg.text, deep_tokens.TEXT_TOWER).module()


def check_schedule(state_dict: Mapping[str, Any], cfg: ClipDecoderConfig) -> list[str]:
    """One line for each way in which a checkpoint's noise schedule is not the config's."""
    lines = buffers.compare(state_dict, cfg.schedule)
    if "scale_factor" in state_dict:
        got, want = float(to_numpy(state_dict["scale_factor"])), cfg.autoencoder.scale_factor
        if not np.isclose(got, want, rtol=1e-3):
            lines.append(f"scale_factor: {got:.6g} in the checkpoint, {want:.6g} by the config")
    return lines


def stray_keys(source: Mapping[str, Any]) -> list[str]:
    """Keys that belong to no part."""
    known = (*deep_tokens.PREFIXES, LANGUAGE_MODEL)
    return engine.stray_keys(source, known, BUFFERS)


def agent_prefix(source: Mapping[str, Any]) -> str:
    """What the language model's keys begin with: nothing where it is alone."""
    return LANGUAGE_MODEL if any(key.startswith(LANGUAGE_MODEL) for key in source) else ""
