"""Denoiser of the small AR-Diffusion: 16 frames of the shapes world from a caption.

python -m train.ar_diffusion --config configs/ar_diffusion/shapes_dit.py --workdir runs/dit

A class is a caption of the world's grammar, with size, colour, shape, motion and background as its
parts: each of the 27 words has a context token of its own, so that captions held out of training
can be asked for. Only the first clip of a video obeys its caption, so that one is learned.

Numbers of a unit vector of 16 have a variance of 1/16: `snr_shift` gives them the noise that a
schedule has for numbers of variance 1. Without it nine of ten timesteps hold more noise than
signal, little is learned of the last details, and frames jitter.
"""

import itertools

from dicode_jax.data import shapes_world
from dicode_jax.data.config import DataConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
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
                channels=16,
                embed_dim=192,
                num_layers=6,
                num_heads=6,
                context_len=len(WORDS),
                context_dim=32,
                qk_norm=True,
            ),
            num_classes=len(said),
            schedule=NoiseSchedule(
                linear_start=1e-4,
                linear_end=1e-2,
                parameterization="x0",
                snr_shift=1 / 16,
                zero_terminal_snr=True,
            ),
            class_parts=tuple(map(len, WORDS)),
        ),
        vae="runs/vae/model",
        cached_clips=5000,
        context_dropout=0.1,
        class_names=tuple(shapes_world.Attributes(**words).caption for words in said),
        optim=OptimConfig(
            optimizer="muon",
            lr=3e-3,
            warmup_steps=100,
            schedule="wsd",
            decay_steps=1000,
            weight_decay=0.0,
        ),
        num_steps=2500,
        batch_size=16,
        ema_decay=0.998,
        sample_guidance=3.0,
        sample_guidance_interval=(0.0, 0.56),
    )
