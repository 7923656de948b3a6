"""What a `config.json` can be of: how each kind is called there, and which dataclass it holds.

A file says its kind and the version of its format. Classes are named and not imported, so that the
floors below them can write the name and refuse another.
"""

import importlib
from typing import Any

__all__ = ["KINDS", "MODULES", "PIPELINES", "TRAININGS", "VERSION", "config_type", "kind_of"]

VERSION = 1
CONFIG_FILE = "config.json"

PIPELINES = {
    "dicode": "pipelines.dicode_config.PipelineConfig",
    "dynamicrafter": "pipelines.dynamicrafter.DynamiCrafterConfig",
    "divot": "pipelines.divot.DivotConfig",
    "ar_diffusion": "pipelines.ar_diffusion.ARDiffusionConfig",
    "landiff": "pipelines.landiff_config.LanDiffConfig",
}
MODULES = {
    "dicode_tokenizer": "models.dicode.tokenizer.DeepTokenizerConfig",
    "dicode_decoder": "models.dicode.decoder.ClipDecoderConfig",
    "dicode_language_model": "models.dicode.ar_config.DiCoDeLMConfig",
    "dicode_representation": "stages.dicode.representation_model.RepresentationConfig",
    "ar_diffusion_denoiser": "models.ar_diffusion.dit.DenoiserConfig",
    "ar_diffusion_frame_vae": "models.ar_diffusion.frame_vae.FrameVAEConfig",
    "landiff_language_model": "models.landiff.language_model.LanguageModelConfig",
    "landiff_semantic_tokenizer": "models.landiff.semantic_tokenizer.SemanticTokenizerConfig",
    "autoencoder_kl": "models.autoencoder_kl.AutoencoderKLConfig",
    "autoencoder_causal3d": "models.autoencoder_causal3d.AutoencoderCausal3DConfig",
    "landiff_denoiser": "models.landiff.dit.DenoiserConfig",
    "cogvideox_transformer": "models.landiff.dit.DiTConfig",
    "clip": "models.clip.CLIPConfig",
    "clip_text": "models.clip.CLIPTextConfig",
    "clip_vision": "models.clip.CLIPVisionConfig",
    "gpt2": "models.gpt2.GPT2Config",
    "i3d": "models.i3d.I3DConfig",
    "inception": "models.inception.InceptionConfig",
    "llama": "models.llama.LlamaConfig",
    "lpips": "models.lpips.LPIPSConfig",
    "patch_discriminator": "models.patch_discriminator.PatchDiscriminatorConfig",
    "resampler": "nn.resampler.ResamplerConfig",
    "shapes_classifier": "models.shapes_classifier.ShapesClassifierConfig",
    "t5_encoder": "models.t5.T5EncoderConfig",
    "unet3d": "models.unet3d.UNet3DConfig",
    "vit": "models.vit.ViTConfig",
}
TRAININGS = {
    "autoencoder_training": "stages.config.AutoencoderTrainConfig",
    "ar_diffusion_vae_training": "stages.ar_diffusion.config.FrameVAETrainConfig",
    "ar_diffusion_dit_training": "stages.ar_diffusion.config.DiTTrainConfig",
    "landiff_lm_training": "stages.landiff.generation_config.LMTrainConfig",
    "landiff_vae_training": "stages.landiff.config.VAE3DTrainConfig",
    "landiff_diffusion_training": "stages.landiff.generation_config.DiffusionTrainConfig",
    "landiff_tokenizer_training": "stages.landiff.config.SemanticTokenizerTrainConfig",
    "representation_training": "stages.dicode.configs.RepresentationTrainConfig",
    "tokenizer_training": "stages.dicode.configs.TokenizerTrainConfig",
    "ar_training": "stages.dicode.configs.ARTrainConfig",
}
KINDS = PIPELINES | MODULES | TRAININGS

_NAMES = {f"dicode_jax.{path}": kind for kind, path in KINDS.items()}


def kind_of(config_type: Any) -> str | None:
    """How files call the configs of a class; None for one that is no file's."""
    return _NAMES.get(f"{config_type.__module__}.{config_type.__qualname__}")


def config_type(kind: str) -> type:
    """The dataclass of a kind."""
    module, _, name = KINDS[kind].rpartition(".")
    return getattr(importlib.import_module(f"dicode_jax.{module}"), name)
