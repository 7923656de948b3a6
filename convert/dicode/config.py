"""The configuration of a whole DiCoDe checkpoint, as its original YAML states it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.engine.rules import defaulted
from convert.parts import autoencoder_kl, buffers, resampler, unet3d
from convert.parts import clip as open_clip
from dicode_jax.config import without_retired
from dicode_jax.errors import OptionGone
from dicode_jax.models.clip import CLIPConfig, CLIPTextConfig
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
from dicode_jax.stages.dicode.tokenizer_loss import TokenizerLossConfig
from dicode_jax.stages.dicode.trainable import TrainableParts


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
    "img_cond_stage_config",
    "llm_config",
    "en_and_decode_n_samples_a_time",
    "fps_condition_type",
    "channels",
    "vae_kl_loss_weight",  # of the regularisers of the deep tokens, which are gone
    "kl_loss_weight_scheduler",
    "kl_loss_sch_tgt_steps",
    "base_learning_rate",
    "scale_lr",
}
# Original option -> (our field, the original's default).
_LOSS = {
    "uncond_prob": ("uncond_prob", 0.2),
    "no_text": ("no_text", False),
    "noise_strength": ("offset_noise", 0.0),
    "loss_type": ("loss_type", "l2"),
    "l_simple_weight": ("simple_weight", 1.0),
    "original_elbo_weight": ("elbo_weight", 0.0),
}
_TRAINABLE = {
    "unet_trainable": ("unet", True),
    "first_block_trainable": ("first_block", True),
    "to_kv_ip_trainable": ("image_projections", True),
    "image_proj_model_trainable": ("resampler", True),
}
_REGULARISERS = ("use_kl_on_latent", "use_sec_mmt", "use_sec_mmt2")  # of the deep tokens
# Beside the original's own arguments: sizes that it takes from files named in them.
_LANGUAGE_MODEL = ("gpt2", "agent", "special_ids")
_KNOWN = {
    *_FIXED,
    *_IGNORED,
    *_LOSS,
    *_TRAINABLE,
    *_REGULARISERS,
    *_LANGUAGE_MODEL,
    *buffers.SCHEDULE,
    "use_dynamic_rescale",
    "clip",
    "uncond_type",
    "conditioning_key",
    "image_proj_type",
    "image_size",
    "scale_factor",
    "unet_config",
    "first_stage_config",
    "cond_stage_config",
    "image_proj_stage_config",
    "image_cat_stage_config",
    "vae_projector_config",
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
    if unknown := sorted(set(options) - _KNOWN):
        raise ValueError(f"unknown option(s) of the diffusion model: {', '.join(unknown)}")
    for name, value in _FIXED.items():
        if options.get(name, value) != value:
            raise ValueError(f"option {name} is only supported as {value!r}, got {options[name]!r}")
    for name in _REGULARISERS:
        if options.get(name, False):
            raise OptionGone(name, True, "the denoising loss alone")
    clip = open_clip.config_from_original(options["clip"]) if "clip" in options else CLIPConfig()
    tokenizer = _tokenizer_config(options, clip)
    lm = None
    if "gpt2" in options:
        lm = {name: options[name] for name in _LANGUAGE_MODEL if name in options}
    text_options = _params(options.get("cond_stage_config", {}))
    return SystemConfig(
        tokenizer=tokenizer,
        decoder=_decoder_config(options, tokenizer),
        text=clip.text,
        text_layer=text_options.get("layer", "last"),
        loss=TokenizerLossConfig(**defaulted(options, _LOSS)),
        trainable=TrainableParts(**defaulted(options, _TRAINABLE)),
        lm=lm,
    )


def _tokenizer_config(options: Mapping[str, Any], clip: CLIPConfig) -> DeepTokenizerConfig:
    if options.get("vae_projector_config") is not None:
        raise OptionGone("use_vae", True, DeepTokenizerConfig.RETIRED["use_vae"][1])
    return DeepTokenizerConfig(
        vision=clip.vision,
        resize="stretch",
        resampler=resampler.config_from_original(_params(options["image_proj_stage_config"])),
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
    autoencoder = autoencoder_kl.config_from_original(options["first_stage_config"])
    size = options.get("image_size")
    size = (size, size) if isinstance(size, int) else size
    gone = {
        "image_proj_type": options.get("image_proj_type"),
        "null_text": null_texts[uncond_type],
    }
    return ClipDecoderConfig(
        **without_retired(ClipDecoderConfig, gone),
        unet=unet3d.config_from_original(options["unet_config"], context_rule="per_frame"),
        autoencoder=dataclasses.replace(autoencoder, scale_factor=options.get("scale_factor", 1.0)),
        schedule=buffers.schedule_from_original(options),
        num_tokens=tokenizer.num_tokens,
        latent_head=head,
        latent_size=None if size is None else tuple(size),
    )


def _params(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("params", config)
