"""A whole DiCoDe checkpoint: deep tokenizer, clip decoder and, where it is there, language model.

Written against the release's `LatentVisualDiffusion` (2535 keys without the agent, 3033 with GPT-2
large). The original loads with `strict=False` and would overlook any mismatch; here every key is
either used, skipped for a stated reason, or an error. A checkpoint brings its own noise-schedule
buffers: they are compared with those of the configuration, and a difference is an error too.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from convert.dicode import lm as dicode_lm
from convert.dicode.config import SystemConfig, config_from_original
from convert.engine.plan import load_module
from convert.engine.rules import LINEAR, ConversionError, Rule, Rules, prefixed, to_numpy
from convert.parts import autoencoder_kl, buffers, resampler, unet3d
from convert.parts import clip as open_clip
from dicode_jax.models.clip import CLIPText, CLIPTextConfig
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.nn.rngs import ShapeRngs

UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
TEXT_TOWER = "cond_stage_model.model."
IMAGE_TOWER = "embedder.model."
RESAMPLER = "image_proj_model."
LATENT_HEAD = "image_cat_proj_model."
LANGUAGE_MODEL = "llm_agent."
VAE_PARTS = ("vae_mean_proj.", "vae_logvar_proj.", "vae_decoder.")
BUFFERS = (*buffers.BUFFERS, "scale_factor")
TOKENIZER_PARTS = (IMAGE_TOWER, RESAMPLER, *VAE_PARTS)
DECODER_PARTS = (UNET, AUTOENCODER, LATENT_HEAD)

TOKENIZER_RULES: Rules = (
    *prefixed(open_clip.VISION_RULES, IMAGE_TOWER, "vision."),
    *prefixed(resampler.RULES, RESAMPLER, "resampler."),
    Rule(r"vae_(mean|logvar)_proj\.weight", "vae_projector.{0}.kernel", LINEAR),
    Rule(r"vae_(mean|logvar)_proj\.bias", "vae_projector.{0}.bias"),
    Rule(r"vae_decoder\.weight", "vae_projector.decoder.kernel", LINEAR),
    Rule(r"vae_decoder\.bias", "vae_projector.decoder.bias"),
)


def decoder_rules(state_dict: Mapping[str, Any], cfg: ClipDecoderConfig) -> Rules:
    """The table of the clip decoder; the UNet's depends on how its projections are stored."""
    unet = unet3d.rules(
        use_linear=unet3d.uses_linear(state_dict, UNET),
        spatial_aware_conv=cfg.unet.spatial_aware_conv,
    )
    return (
        *prefixed(unet, UNET, "unet."),
        *prefixed(autoencoder_kl.RULES, AUTOENCODER, "autoencoder."),
        *prefixed(resampler.RULES, LATENT_HEAD, "latent_head."),
        Rule(r"text_context", "text_context"),
        Rule(r"null_tokens", "null_tokens"),
    )


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
    problems = stray_keys(source)
    has_lm = any(key.startswith(LANGUAGE_MODEL) for key in source)
    if has_lm and cfg.lm is None:
        raise ValueError("the checkpoint has a language model: give its `gpt2` and `agent` sizes")
    tokenizer = _attempt(problems, lambda: tokenizer_from_torch(source, cfg))
    decoder = _attempt(problems, lambda: _decoder(source, cfg, tokenizer))
    lm = None
    if has_lm:
        agent = below(source, LANGUAGE_MODEL)
        lm = _attempt(problems, lambda: dicode_lm.from_torch(agent, cfg.lm))
    if problems:
        raise ConversionError(problems)
    return System(tokenizer, decoder, lm)


def tokenizer_from_torch(
    state_dict: Mapping[str, Any], config: Mapping[str, Any] | SystemConfig | DeepTokenizerConfig
) -> DeepTokenizer:
    """The deep tokenizer of a checkpoint; keys of other parts are left alone.

    Raises:
      ValueError: The configuration has an option that is not supported.
      ConversionError: Keys or shapes of this part do not fit.
    """
    source = unwrap(state_dict)
    cfg = config
    if not isinstance(cfg, DeepTokenizerConfig):
        cfg = config_from_original(cfg).tokenizer
    own = select(source, TOKENIZER_PARTS)
    return load_module(lambda: DeepTokenizer(cfg, rngs=ShapeRngs()), own, TOKENIZER_RULES)


def decoder_from_torch(
    state_dict: Mapping[str, Any], config: Mapping[str, Any] | SystemConfig
) -> ClipDecoder:
    """The clip decoder of a checkpoint, with its constants; keys of the agent are left alone.

    The constants come from the text tower (empty prompt) and the tokenizer (zero image), so those
    parts must be in the state dict.

    Raises:
      ValueError: The configuration has an option that is not supported.
      ConversionError: Keys or shapes do not fit, or the noise schedule is another one.
    """
    source, cfg = unwrap(state_dict), config_from_original(config)
    return _decoder(source, cfg, tokenizer_from_torch(source, cfg))


def text_tower_from_torch(
    state_dict: Mapping[str, Any], config: Mapping[str, Any] | SystemConfig
) -> CLIPText:
    """The text tower of a checkpoint (`cond_stage_model`), used for the empty prompt alone."""
    source, cfg = unwrap(state_dict), config_from_original(config)
    return open_clip.text_from_torch(below(source, TEXT_TOWER), cfg.text)


def empty_prompt_ids(cfg: CLIPTextConfig) -> np.ndarray:
    """Token ids of the empty prompt, int32 [1, positions]: start, end, zeros."""
    ids = np.zeros((1, cfg.max_seq_len), np.int32)
    ids[0, :2] = cfg.vocab_size - 2, cfg.vocab_size - 1
    return ids


def null_tokens_of(tokenizer: DeepTokenizer) -> jnp.ndarray:
    """Deep tokens of a zero image as guidance uses them, [n, z]: with a posterior, its mean."""
    tokens = tokenizer.null_tokens()
    return tokenizer.posterior(tokens)[0] if tokenizer.cfg.use_vae else tokens


def check_schedule(state_dict: Mapping[str, Any], cfg: ClipDecoderConfig) -> list[str]:
    """One line for each way in which a checkpoint's noise schedule is not the config's."""
    lines = buffers.compare(state_dict, cfg.schedule)
    if "scale_factor" in state_dict:
        got, want = float(to_numpy(state_dict["scale_factor"])), cfg.autoencoder.scale_factor
        if not np.isclose(got, want, rtol=1e-3):
            lines.append(f"scale_factor: {got:.6g} in the checkpoint, {want:.6g} by the config")
    return lines


def _decoder(
    source: Mapping[str, Any], cfg: SystemConfig, tokenizer: DeepTokenizer | None
) -> ClipDecoder:
    problems = check_schedule(source, cfg.decoder)
    own = select(source, DECODER_PARTS)
    text = _attempt(problems, lambda: text_tower_from_torch(source, cfg))
    if text is not None and tokenizer is not None:
        ids = jnp.asarray(empty_prompt_ids(cfg.text))
        own["text_context"] = np.asarray(text(ids, cfg.text_layer)[0])
        own["null_tokens"] = np.asarray(null_tokens_of(tokenizer))
    rules = decoder_rules(source, cfg.decoder)
    decoder = _attempt(
        problems,
        lambda: load_module(lambda: ClipDecoder(cfg.decoder, rngs=ShapeRngs()), own, rules),
    )
    if problems:
        raise ConversionError(problems)
    return decoder


def _attempt(problems: list[str], convert: Callable[[], Any]) -> Any:
    """The result of a conversion, or None with its complaint added to ``problems``."""
    try:
        return convert()
    except ConversionError as error:
        problems += error.problems
        return None


def stray_keys(source: Mapping[str, Any]) -> list[str]:
    """Keys that belong to no part."""
    known = (*TOKENIZER_PARTS, *DECODER_PARTS, TEXT_TOWER, LANGUAGE_MODEL)
    stray = [k for k in source if not k.startswith(known) and k not in BUFFERS]
    return [f"unused source key: {key}" for key in sorted(stray)]


def select(source: Mapping[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    """The keys that begin with one of the prefixes."""
    return {key: value for key, value in source.items() if key.startswith(prefixes)}


def below(source: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The keys below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in source.items() if k.startswith(prefix)}
