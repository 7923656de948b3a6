"""A tiny LanDiff with every parameter drawn, its words those of the shapes world."""

import dataclasses

import numpy as np
from tiny import random_module

from dicode_jax.data.shapes_world import all_captions
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3DConfig
from dicode_jax.models.landiff.dit import DenoiserConfig, DiTConfig
from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.language_model import RELEASED_BODY, LanguageModelConfig
from dicode_jax.models.landiff.semantic import UpsamplerConfig
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizerConfig
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.models.t5 import T5EncoderConfig
from dicode_jax.models.vit import ViTConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.pipelines.landiff import PARTS, LanDiffPipeline
from dicode_jax.pipelines.landiff_config import LanDiffConfig, LanDiffSamplingConfig
from dicode_jax.text.t5 import learn_words

FRAMES = FrameTokens(iframe=3, pframe=1, segment=3)
TEXT = T5EncoderConfig(num_layers=1, num_heads=2, embed_dim=6, head_dim=4, mlp_dim=7, vocab_size=40)
BODY = LlamaConfig(
    **vars(RELEASED_BODY)
    | {"num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 8, "mlp_dim": 10}
    | {"vocab_size": 12, "max_seq_len": 80}
)
CONFIGS = {
    "text_encoder": TEXT,
    "language_model": LanguageModelConfig(
        body=BODY, frames=FRAMES, codebook_size=5, text_dim=6, micro_dim=7, sinusoid_dim=4
    ),
    "semantic_tokenizer": SemanticTokenizerConfig(
        frames=FRAMES, grid=(2, 3), feature_dim=8, embed_dim=16, num_layers=1, num_heads=1,
        token_dim=6, codebook_size=5, code_dim=4,
    ),
    "denoiser": DenoiserConfig(
        dit=DiTConfig(
            num_frames=5, height=4, width=6, channels=2, embed_dim=16, num_layers=2, num_heads=2,
            time_dim=5, text_len=15, text_dim=6,
        ),
        control_layers=1,
        upsampler=UpsamplerConfig(
            feature_dim=8, channels=(4, 8), num_res_blocks=1, hidden_dim=3, num_groups=2
        ),
    ),
    "vae": AutoencoderCausal3DConfig(
        channels=2, encoder_mult=(1, 1, 1), decoder_mult=(1, 1, 1), encoder_blocks=1,
        decoder_blocks=1, z_channels=2, time_factor=4, num_groups=2,
    ),
    "features": ViTConfig(
        image_size=24, patch_size=8, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=9
    ),
}  # fmt: skip
SAMPLING = LanDiffSamplingConfig(num_inference_steps=2, temperature=2.0)
CONFIG = LanDiffConfig(prefix_latents=3, text_length=16, sampling=SAMPLING)


def make(configs=None, **changes):
    """Frames of 16 x 24; a window has 17 of them, a further clip 8 more."""
    parts = {
        name: random_module(lambda name=name, cfg=cfg: PARTS[name][0](cfg, rngs=ShapeRngs()))
        for name, cfg in (configs or CONFIGS).items()
    }
    for kernel in (
        parts["language_model"].body.head.kernel,
        parts["language_model"].text_in.kernel,
    ):
        kernel[...] = kernel[...] * 20  # scores far apart
    parts["vae"].decoder.conv_out.kernel[...] = parts["vae"].decoder.conv_out.kernel[...] * 2
    text = {"text_encoder": learn_words(all_captions())}
    config = dataclasses.replace(CONFIG, **changes)
    return LanDiffPipeline(parts, config=config, text=text)


def video(count, seed=0):
    """Frames in the model's size."""
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 24, 3), np.uint8)
