"""Image tower and resampler of the small system, first to pixels (needs no autoencoder).

python -m train.tokenizer --config configs/shapes_pixels.py --workdir runs/pixels

Expected: not measured yet.
"""

import dataclasses

from configs import shapes_parts
from dicode_jax.training.optim import OptimConfig
from train.configs import RepresentationTrainConfig


def get_config() -> RepresentationTrainConfig:
    head = dataclasses.replace(shapes_parts.LATENT_HEAD, output_shape=(64, 64, 3))
    return RepresentationTrainConfig(
        model=shapes_parts.representation(head),
        optim=OptimConfig(lr=1.5e-3, warmup_steps=200, weight_decay=0.01),
        num_steps=5000,
        batch_size=32,
    )
