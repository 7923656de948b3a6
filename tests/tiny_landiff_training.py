"""Tiny LanDiff trainings, and a cache for them."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
from tiny_landiff import TINY

from dicode_jax.data import encoded_cache
from dicode_jax.data.config import DataConfig
from dicode_jax.data.encoded_cache import Example, Spec, shard_path
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3DConfig
from dicode_jax.models.clip import CLIPVisionConfig
from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.language_model import LanguageModelConfig
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizerConfig
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.models.t5 import T5EncoderConfig
from dicode_jax.stages.landiff.config import SemanticTokenizerTrainConfig
from dicode_jax.stages.landiff.generation_config import DiffusionTrainConfig, LMTrainConfig
from dicode_jax.training.optim import OptimConfig

FRAMES = FrameTokens(iframe=4, pframe=2, segment=3)  # 8 codes and 6 marks in a segment
LM = LanguageModelConfig(
    body=LlamaConfig(
        num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=16, mlp_dim=20, max_seq_len=100,
        vocab_size=16, rope_scaling=None, rotates_pairs=True, activation="tanh_gelu",
        last_norm="layer", tie_embeddings=False,
    ),
    frames=FRAMES, codebook_size=9, text_dim=12, micro_dim=6, sinusoid_dim=8,
)  # fmt: skip
TEXT = T5EncoderConfig(
    num_layers=1, num_heads=2, embed_dim=12, head_dim=5, mlp_dim=14, vocab_size=40, num_buckets=8,
    max_distance=12,
)  # fmt: skip
CAPTIONS = (
    "a red circle moves left on a gray background",
    "a small blue cross grows on a navy background",
    "a large white square stays still on a black background",
)
LM_CONFIG = LMTrainConfig(
    model=LM,
    text=TEXT,
    data=DataConfig(path="unused", kind="cache", validation=0.0),
    optim=OptimConfig(lr=1e-2, warmup_steps=0, schedule="constant", weight_decay=0.0),
    segments=2,
    text_length=14,
    num_steps=20,
    batch_size=3,
)

SEMANTIC = SemanticTokenizerConfig(
    frames=FRAMES, grid=(2, 3), feature_dim=11, embed_dim=16, num_layers=1, num_heads=1,
    token_dim=10, codebook_size=9, code_dim=3,
)  # fmt: skip
DIFFUSION_CONFIG = DiffusionTrainConfig(
    model=dataclasses.replace(
        TINY, dit=dataclasses.replace(TINY.dit, num_frames=3, text_len=14, text_dim=12)
    ),
    semantic=SEMANTIC,
    text=TEXT,
    data=LM_CONFIG.data,
    optim=OptimConfig(
        optimizer="sgd",
        lr=0.1,
        warmup_steps=0,
        schedule="constant",
        b1=0.0,
        clip_norm=0.0,
        weight_decay=0.0,
    ),
    num_known=1,
    window_step=2,
    sample_steps=2,
    sample_guidance=0.0,
    num_steps=4,
    batch_size=3,
)

TOWER = CLIPVisionConfig(
    image_size=8, patch_size=4, embed_dim=6, num_layers=1, num_heads=2, output_dim=None
)
TOKENIZER_CONFIG = SemanticTokenizerTrainConfig(
    model=SemanticTokenizerConfig(
        frames=FrameTokens(iframe=3, pframe=2, segment=3), grid=(2, 2), feature_dim=6, embed_dim=16,
        num_layers=1, num_heads=1, token_dim=5, codebook_size=8, code_dim=4,
    ),
    data=DataConfig(num_frames=9),
    optim=OptimConfig(lr=3e-3, warmup_steps=0),
    num_steps=30,
    batch_size=8,
    frame_size=8,
)  # fmt: skip

VAE = AutoencoderCausal3DConfig(
    channels=4, encoder_mult=(1, 1, 1), decoder_mult=(1, 1, 1), encoder_blocks=1, decoder_blocks=1,
    z_channels=3, time_factor=4, num_groups=2,
)  # fmt: skip


def write_cache(
    folder: pathlib.Path,
    frames=(7, 4, 11),
    *,
    tokens: FrameTokens = FRAMES,
    codebook_size: int = 9,
    latent=(4, 6, 3),
    text=(),
    **settings,
) -> DataConfig:
    """Videos of these semantic frames; number `i` in the cache of a video is its motion's too."""
    rng = np.random.default_rng(0)
    schema = {
        "codes": Spec("int16", (None,)),
        "latents": Spec("bfloat16", (None, *latent)),
        "motion": Spec("float32", (None,)),
        **{name: Spec("bfloat16", (None, width)) for name, width in text},
    }
    encoded_cache.write_plan(folder, {"encoder": "a" * 64, "settings": settings})
    examples = []
    for v, g in enumerate(frames):
        arrays = {
            "codes": rng.integers(0, codebook_size, tokens.count(g)),
            "latents": jnp.asarray(rng.normal(size=(g, *latent)), jnp.bfloat16),
            "motion": np.arange(g) / 100,
        }
        arrays |= {name: jnp.ones((5 + v, width), jnp.bfloat16) for name, width in text}
        caption = CAPTIONS[v % len(CAPTIONS)]
        examples.append(Example(name=f"{v}.mp4", captions=(caption,), arrays=arrays))
    encoded_cache.write_shard(shard_path(folder, 0, 1), examples, schema, {})
    encoded_cache.write_manifest(folder, 1, schema)
    return dataclasses.replace(LM_CONFIG.data, path=str(folder))
