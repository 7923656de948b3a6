"""Denoiser of the small AR-Diffusion: 16 frames of the shapes world from a caption. Not measured.

python -m train.ar_diffusion --config configs/ar_diffusion/shapes_dit.py --workdir runs/dit

A class is a caption of the world's grammar, with size, colour, shape, motion and background as its
parts: each of the 27 words has a context token of its own, so that captions held out of training
can be asked for. Only the first clip of a video obeys its caption, so that one is learned.
"""

import itertools

from dicode_jax.data import shapes_world
from dicode_jax.data.config import DataConfig
from dicode_jax.models.ar_diffusion.dit import DenoiserConfig, DiTConfig
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig
from dicode_jax.training.optim import OptimConfig

FIELDS = ("size", "color", "shape", "motion", "background")
WORDS = (
    shapes_world.SIZES,
    tuple(shapes_world.COLORS),
    shapes_world.SHAPES,
    shapes_world.MOTIONS,
    tuple(shapes_world.BACKGROUNDS),
)


def get_config() -> DiTTrainConfig:
    said = [dict(zip(FIELDS, words, strict=True)) for words in itertools.product(*WORDS)]
    return DiTTrainConfig(
        data=DataConfig(clip_start="start"),
        model=DenoiserConfig(
            dit=DiTConfig(
                num_tokens=8,
                channels=8,
                embed_dim=192,
                num_layers=6,
                num_heads=6,
                context_len=len(WORDS),
                context_dim=32,
                qk_norm=True,
            ),
            num_classes=len(said),
            class_parts=tuple(map(len, WORDS)),
        ),
        vae="runs/vae/model",
        cached_clips=16_000,
        context_dropout=0.1,
        class_names=tuple(shapes_world.Attributes(**words).caption for words in said),
        optim=OptimConfig(
            optimizer="muon", lr=3e-3, warmup_steps=100, schedule="wsd", weight_decay=0.0
        ),
        num_steps=5000,
        batch_size=16,
        ema_decay=0.998,
        sample_guidance=1.0,
    )
