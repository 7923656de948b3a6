"""Language model for a few videos that are learned by heart: a caption to two keyframes' tokens.

python -m train.ar --config configs/clips_ar.py --workdir runs/clips/ar --data.path VIDEOS

Its vocabulary is learnt from the captions, whatever they hold, and kept in the run's folder.

Measured on three videos, with the vocabulary of the shapes world: loss -3.11 after 400 steps, 6
minutes on half of one CPU core. The videos that their captions give then are 28 to 35 dB from the
true ones.
"""

import dataclasses

from configs import shapes_ar
from dicode_jax.data.config import DataConfig
from dicode_jax.stages.dicode.configs import ARTrainConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> ARTrainConfig:
    shapes = shapes_ar.get_config()
    body = dataclasses.replace(shapes.model.body, max_seq_len=128)
    return dataclasses.replace(
        shapes,
        model=dataclasses.replace(shapes.model, body=body),
        data=DataConfig(path="videos", validation=0.0, clip_start="start"),
        tokenizer="runs/clips/tokenizer/model",
        text_length=80,
        cached_videos=0,
        optim=OptimConfig(optimizer="muon", lr=3e-3, warmup_steps=50, weight_decay=0.0),
        num_steps=400,
        batch_size=6,
        input_noise=0.05,
        ema_decay=0.99,
    )
