"""A tiny AR-Diffusion pipeline with every parameter drawn."""

import numpy as np
from flax import nnx

from dicode_jax.models.ar_diffusion.dit import Denoiser, DenoiserConfig, DiTConfig
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE, FrameVAEConfig
from dicode_jax.models.maskgit_decoder import MaskGITDecoderConfig
from dicode_jax.models.query_tokenizer import QueryTransformerConfig
from dicode_jax.pipelines.ar_diffusion import (
    ARDiffusionConfig,
    ARDiffusionPipeline,
    FrameSamplingConfig,
)

SIDE = QueryTransformerConfig(patch_size=4, embed_dim=12, num_layers=1, num_heads=3)
VAE = FrameVAEConfig(
    image_size=8,
    num_tokens=3,
    token_dim=4,
    codebook_size=7,
    encoder=SIDE,
    decoder=SIDE,
    pixel_decoder=MaskGITDecoderConfig(
        z_channels=6, channels=4, channel_mult=(1, 2, 2), num_res_blocks=1, num_groups=2
    ),
)
DIT = DiTConfig(
    num_frames=4,
    num_tokens=3,
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    context_len=2,
    context_dim=5,
)
SAMPLING = FrameSamplingConfig(num_frames=5, num_inference_steps=6, lag=2)


def alive(module, seed, spread=0.3):
    """The module with every parameter drawn, so that no branch is zero.

    With a spread of 0.3 a sampler makes a difference of 1e-6 one of 1 in a few steps.
    """
    graph, state = nnx.split(module)
    rng = np.random.default_rng(seed)
    draw = lambda x: x + spread * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    return nnx.merge(graph, nnx.map_state(lambda _, v: v.replace(draw(v[...])), state))


def make(num_classes=3, spread=0.3, vae=VAE, **config):
    denoiser = DenoiserConfig(dit=DIT, num_classes=num_classes)
    parts = {
        "denoiser": alive(Denoiser(denoiser, rngs=nnx.Rngs(0)), 0, spread),
        "vae": alive(FrameVAE(vae, rngs=nnx.Rngs(1)), 1),
    }
    if num_classes:
        config = {"class_names": ("Archery", "Basketball", "Crawling")} | config
    return ARDiffusionPipeline(parts, config=ARDiffusionConfig(sampling=SAMPLING, **config))
