"""All trainings as stages: what is built, loaded, trained, and written out."""

from typing import Any

from dicode_jax.stages import autoencoder
from dicode_jax.stages.ar_diffusion import dit, frame_vae
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig, FrameVAETrainConfig
from dicode_jax.stages.config import AutoencoderTrainConfig
from dicode_jax.stages.dicode import configs, language_model, representation, tokenizer
from dicode_jax.stages.landiff import diffusion as landiff_diffusion
from dicode_jax.stages.landiff import language_model as landiff_lm
from dicode_jax.stages.landiff import semantic_tokenizer, vae3d
from dicode_jax.stages.landiff.config import SemanticTokenizerTrainConfig, VAE3DTrainConfig
from dicode_jax.stages.landiff.generation_config import DiffusionTrainConfig, LMTrainConfig
from dicode_jax.training.stage import Stage

__all__ = ["build_stage"]

_STAGES = {
    AutoencoderTrainConfig: autoencoder.make_stage,
    FrameVAETrainConfig: frame_vae.make_stage,
    DiTTrainConfig: dit.make_stage,
    LMTrainConfig: landiff_lm.make_stage,
    VAE3DTrainConfig: vae3d.make_stage,
    DiffusionTrainConfig: landiff_diffusion.make_stage,
    SemanticTokenizerTrainConfig: semantic_tokenizer.make_stage,
    configs.RepresentationTrainConfig: representation.make_stage,
    configs.TokenizerTrainConfig: tokenizer.make_stage,
    configs.ARTrainConfig: language_model.make_stage,
}


def build_stage(config: Any) -> Stage:
    """The stage that a config of `stages.configs` describes; weights are not touched yet.

    Raises:
      UserError: A folder that the config names is missing, or does not fit it.
    """
    return _STAGES[type(config)](config)
