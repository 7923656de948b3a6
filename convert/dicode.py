"""A whole DiCoDe checkpoint: deep tokenizer, clip decoder and, where it is there, language model.

Written against the release's `LatentVisualDiffusion` (2535 keys without the agent, 3033 with GPT-2
large). The original loads with `strict=False` and would overlook any mismatch; here every key is
either used, skipped for a stated reason, or an error. A checkpoint brings its own noise-schedule
buffers: they are compared with those of the configuration, and a difference is an error too.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import autoencoder_kl, dicode_lm, open_clip, resampler, unet3d
from convert.plan import load_module
from convert.rules import LINEAR, ConversionError, Rule, Rules, prefixed, to_numpy
from dicode_jax.diffusion.schedules import PERSISTENT_BUFFERS, NoiseSchedule
from dicode_jax.models.clip import CLIPConfig, CLIPText, CLIPTextConfig
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.models.dicode.tokenizer_loss import TokenizerLossConfig
from dicode_jax.models.dicode.trainable import TrainableParts

UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
TEXT_TOWER = "cond_stage_model.model."
IMAGE_TOWER = "embedder.model."
RESAMPLER = "image_proj_model."
LATENT_HEAD = "image_cat_proj_model."
LANGUAGE_MODEL = "llm_agent."
VAE_PARTS = ("vae_mean_proj.", "vae_logvar_proj.", "vae_decoder.")
BUFFERS = (*PERSISTENT_BUFFERS, "scale_arr", "scale_factor")

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """Configurations of all parts, as read from an original one.

    Attributes:
      tokenizer: Of the deep tokenizer.
      decoder: Of the clip decoder, noise schedule included.
      text: Of the text tower that embeds the empty prompt.
      text_layer: "penultimate" or "last".
      loss: Settings of the training loss.
      trainable: Which parts the original would train.
      lm: Original agent configuration (`gpt2`, `agent`), ours, or None.
    """

    tokenizer: DeepTokenizerConfig
    decoder: ClipDecoderConfig
    text: CLIPTextConfig
    text_layer: str = "penultimate"
    loss: TokenizerLossConfig = dataclasses.field(default_factory=TokenizerLossConfig)
    trainable: TrainableParts = dataclasses.field(default_factory=TrainableParts)
    lm: Mapping[str, Any] | DiCoDeLMConfig | None = None


# Options of the original with one supported value.
_FIXED = {
    "scale_by_std": False,
    "use_ema": False,
    "given_betas": None,
    "learn_logvar": False,
    "logvar_init": 0.0,
    "encoder_type": "2d",
    "cond_stage_forward": None,
    "use_positional_encodings": False,
    "cosine_s": 8e-3,
    "num_timesteps_cond": 1,
}
# Options that say where data comes from, what is logged or trained: nothing of the computation.
_IGNORED = {
    "log_every_t",
    "first_stage_key",
    "cond_stage_key",
    "cond_stage_trainable",
    "freeze_embedder",
    "monitor",
    "ckpt_path",
    "ignore_keys",
    "load_only_unet",
    "only_model",
    "clip_denoised",
    "scheduler_config",
    "logdir",
    "loop_video",
    "rand_cond_frame",  # only read by image_proj_type None, which is refused
    "perframe_ae",
    "en_and_decode_n_samples_a_time",
    "fps_condition_type",
    "channels",
    "base_learning_rate",
    "scale_lr",
}
_READ = {
    "beta_schedule",
    "linear_start",
    "linear_end",
    "timesteps",
    "parameterization",
    "rescale_betas_zero_snr",
    "use_dynamic_rescale",
    "base_scale",
    "turning_step",
    "v_posterior",
    "loss_type",
    "l_simple_weight",
    "original_elbo_weight",
    "noise_strength",
    "uncond_prob",
    "uncond_type",
    "no_text",
    "vae_kl_loss_weight",
    "kl_loss_weight_scheduler",
    "kl_loss_sch_tgt_steps",
    "use_kl_on_latent",
    "use_sec_mmt",
    "use_sec_mmt2",
    "conditioning_key",
    "image_proj_type",
    "image_proj_model_trainable",
    "unet_trainable",
    "first_block_trainable",
    "to_kv_ip_trainable",
    "image_size",
    "scale_factor",
    "unet_config",
    "first_stage_config",
    "cond_stage_config",
    "img_cond_stage_config",
    "image_proj_stage_config",
    "image_cat_stage_config",
    "vae_projector_config",
    "llm_config",
    # Beside the original's own arguments: sizes that it takes from files named in them.
    "clip",
    "gpt2",
    "agent",
    "special_ids",
}


def config_from_original(config: Mapping[str, Any] | SystemConfig) -> SystemConfig:
    """Reads the `params` of the original's `model` node (or a mapping that holds that node).

    Sizes that the original takes from other files may stand beside them: `clip` (an open_clip
    configuration, ViT-H/14 when absent), `gpt2` and `agent` (the language model, none when absent).

    Raises:
      ValueError: An option is unknown, or has a value that cannot be honoured.
    """
    if isinstance(config, SystemConfig):
        return config
    options = dict(config.get("model", config))
    options = dict(options.get("params", options))
    if unknown := sorted(set(options) - _READ - _IGNORED - set(_FIXED)):
        raise ValueError(f"unknown option(s) of the diffusion model: {', '.join(unknown)}")
    for name, value in _FIXED.items():
        if options.get(name, value) != value:
            raise ValueError(f"option {name} is only supported as {value!r}, got {options[name]!r}")
    clip = open_clip.config_from_original(options["clip"]) if "clip" in options else CLIPConfig()
    tokenizer = _tokenizer_config(options, clip)
    lm = None
    if "gpt2" in options:
        lm = {k: options[k] for k in ("gpt2", "agent", "special_ids") if k in options}
    text_options = _params(options.get("cond_stage_config", {}))
    return SystemConfig(
        tokenizer=tokenizer,
        decoder=_decoder_config(options, tokenizer),
        text=clip.text,
        text_layer=text_options.get("layer", "last"),
        loss=loss_config_from_original(options),
        trainable=TrainableParts(
            unet=options.get("unet_trainable", True),
            first_block=options.get("first_block_trainable", True),
            image_projections=options.get("to_kv_ip_trainable", True),
            resampler=options.get("image_proj_model_trainable", True),
        ),
        lm=lm,
    )


def schedule_from_original(options: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of the original's arguments, with the original's defaults."""
    return NoiseSchedule(
        num_timesteps=options.get("timesteps", 1000),
        beta_schedule=options.get("beta_schedule", "linear"),
        linear_start=options.get("linear_start", 1e-4),
        linear_end=options.get("linear_end", 2e-2),
        zero_terminal_snr=options.get("rescale_betas_zero_snr", False),
        parameterization=options.get("parameterization", "eps"),
        base_scale=options.get("base_scale", 0.7) if options.get("use_dynamic_rescale") else None,
        turning_step=options.get("turning_step", 400),
        v_posterior=options.get("v_posterior", 0.0),
    )


def loss_config_from_original(options: Mapping[str, Any]) -> TokenizerLossConfig:
    """The training-loss settings of the original's arguments, with the original's defaults.

    Raises:
      ValueError: More than one regulariser of the deep tokens is on.
    """
    switches = {
        "vae": options.get("vae_projector_config") is not None,
        "kl_on_latent": options.get("use_kl_on_latent", False),
        "second_moment": options.get("use_sec_mmt", False),
        "second_moment_per_channel": options.get("use_sec_mmt2", False),
    }
    chosen = [name for name, on in switches.items() if on]
    if len(chosen) > 1:
        raise ValueError(f"at most one regulariser of the deep tokens is allowed, got {chosen}")
    return TokenizerLossConfig(
        uncond_prob=options.get("uncond_prob", 0.2),
        no_text=options.get("no_text", False),
        extra=chosen[0] if chosen else "none",
        extra_weight=options.get("vae_kl_loss_weight", 1e-4),
        extra_scheduler=options.get("kl_loss_weight_scheduler", "constant"),
        extra_steps=options.get("kl_loss_sch_tgt_steps", 1),
        offset_noise=options.get("noise_strength", 0.0),
        loss_type=options.get("loss_type", "l2"),
        simple_weight=options.get("l_simple_weight", 1.0),
        elbo_weight=options.get("original_elbo_weight", 0.0),
    )


def _tokenizer_config(options: Mapping[str, Any], clip: CLIPConfig) -> DeepTokenizerConfig:
    projector = options.get("vae_projector_config")
    return DeepTokenizerConfig(
        vision=clip.vision,
        resampler=resampler.config_from_original(_params(options["image_proj_stage_config"])),
        use_vae=projector is not None,
        vae_decoder=projector is not None and "decoder" in projector,
    )


def _decoder_config(
    options: Mapping[str, Any], tokenizer: DeepTokenizerConfig
) -> ClipDecoderConfig:
    conditioning = options.get("conditioning_key") or "crossattn"
    if conditioning not in ("crossattn", "hybrid_concat"):
        raise ValueError(
            f"conditioning_key {conditioning!r} is not supported; use 'crossattn' or "
            "'hybrid_concat' (frame concatenation of DynamiCrafter has no deep tokens to decode)"
        )
    head = None
    if conditioning == "hybrid_concat":
        if options.get("image_cat_stage_config") is None:
            raise ValueError("conditioning_key 'hybrid_concat' needs image_cat_stage_config")
        head = resampler.config_from_original(_params(options["image_cat_stage_config"]))
    null_texts = {"empty_seq": "empty", "zero_embed": "zeros"}
    uncond_type = options.get("uncond_type", "empty_seq")
    if uncond_type not in null_texts:
        raise ValueError(f"uncond_type must be one of {list(null_texts)}, got {uncond_type!r}")
    autoencoder = autoencoder_kl.config_from_original(
        dict(_without_idle(_params(options["first_stage_config"])))
    )
    size = options.get("image_size")
    size = (size, size) if isinstance(size, int) else size
    return ClipDecoderConfig(
        unet=unet3d.config_from_original(options["unet_config"], context_rule="per_frame"),
        autoencoder=dataclasses.replace(autoencoder, scale_factor=options.get("scale_factor", 1.0)),
        schedule=schedule_from_original(options),
        num_tokens=tokenizer.num_tokens,
        image_proj_type=options.get("image_proj_type"),
        latent_head=head,
        null_text=null_texts[uncond_type],
        latent_size=None if size is None else tuple(size),
    )


def _params(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("params", config)


def _without_idle(config: Mapping[str, Any]) -> dict[str, Any]:
    """The autoencoder's node without what only its own training reads."""
    return {k: v for k, v in config.items() if k not in ("monitor", "lossconfig", "ckpt_path")}


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
    problems = _stray_keys(source)
    has_lm = any(key.startswith(LANGUAGE_MODEL) for key in source)
    if has_lm and cfg.lm is None:
        raise ValueError("the checkpoint has a language model: give its `gpt2` and `agent` sizes")
    tokenizer = _attempt(problems, lambda: tokenizer_from_torch(source, cfg))
    decoder = _attempt(problems, lambda: _decoder(source, cfg, tokenizer))
    lm = None
    if has_lm:
        agent = _below(source, LANGUAGE_MODEL)
        lm = _attempt(problems, lambda: dicode_lm.from_torch(agent, cfg.lm))
    if problems:
        raise ConversionError("\n".join(problems))
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
    own = _select(source, (IMAGE_TOWER, RESAMPLER, *VAE_PARTS))
    return load_module(lambda: DeepTokenizer(cfg, rngs=nnx.Rngs(0)), own, TOKENIZER_RULES)


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
    return open_clip.text_from_torch(_below(source, TEXT_TOWER), cfg.text)


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
    """One line for each noise-schedule buffer of a checkpoint that differs from the config's.

    A buffer that is absent is not checked. Half-precision buffers are compared as such.
    """
    lines = []
    for name in BUFFERS:
        if name not in state_dict:
            continue
        bits = {"float16": 10, "bfloat16": 7}.get(str(state_dict[name].dtype).split(".")[-1], 17)
        got = to_numpy(state_dict[name]).astype(np.float64)
        if name == "scale_factor":
            want = np.asarray(cfg.autoencoder.scale_factor)
        elif name == "scale_arr":
            want = cfg.schedule.scale_array
        else:
            want = cfg.schedule.table(name)
        if got.shape != want.shape:
            lines.append(f"{name}: shape {got.shape} in the checkpoint, {want.shape} by the config")
        elif not np.allclose(got, want, rtol=2.0**-bits, atol=2.0**-bits * 1e-3):
            lines.append(
                f"{name}: the checkpoint's noise schedule is not the configured one "
                f"({got.flat[0]:.6g} .. {got.flat[-1]:.6g} against "
                f"{want.flat[0]:.6g} .. {want.flat[-1]:.6g})"
            )
    return lines


def _decoder(
    source: Mapping[str, Any], cfg: SystemConfig, tokenizer: DeepTokenizer | None
) -> ClipDecoder:
    problems = check_schedule(source, cfg.decoder)
    own = _select(source, (UNET, AUTOENCODER, LATENT_HEAD))
    text = _attempt(problems, lambda: text_tower_from_torch(source, cfg))
    if text is not None and tokenizer is not None:
        ids = jnp.asarray(empty_prompt_ids(cfg.text))
        own["text_context"] = np.asarray(text(ids, cfg.text_layer)[0])
        own["null_tokens"] = np.asarray(null_tokens_of(tokenizer))
    rules = decoder_rules(source, cfg.decoder)
    decoder = _attempt(
        problems,
        lambda: load_module(lambda: ClipDecoder(cfg.decoder, rngs=nnx.Rngs(0)), own, rules),
    )
    if problems:
        raise ConversionError("\n".join(problems))
    return decoder


def _attempt(problems: list[str], convert: Callable[[], Any]) -> Any:
    """The result of a conversion, or None with its complaint added to ``problems``."""
    try:
        return convert()
    except ConversionError as error:
        problems.append(str(error))
        return None


def _stray_keys(source: Mapping[str, Any]) -> list[str]:
    """Keys that belong to no part."""
    parts = (UNET, AUTOENCODER, TEXT_TOWER, IMAGE_TOWER, RESAMPLER, LATENT_HEAD, LANGUAGE_MODEL)
    known = (*parts, *VAE_PARTS)
    stray = [k for k in source if not k.startswith(known) and k not in BUFFERS]
    return [f"unused source key: {key}" for key in sorted(stray)]


def _select(source: Mapping[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key.startswith(prefixes)}


def _below(source: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The keys below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in source.items() if k.startswith(prefix)}
