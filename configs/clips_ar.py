"""Language model for a few videos that are learned by heart: a caption to two keyframes' tokens.

python -m train.ar --config configs/clips_ar.py --workdir runs/clips/ar --data.path VIDEOS

Its vocabulary is learnt from the captions, whatever they hold, and kept in the run's folder.

Measured on three videos: loss -3.13 after 400 steps, 5 minutes of one CPU core. Drawn at
temperature 0.3 (`logits_temperature`, of shapes_ar.py) keyframes of six seeds were right for all
three captions; at 1 two of the eighteen samples had a keyframe of another video.
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
