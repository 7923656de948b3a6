"""KL-VAE for a few videos that are learned by heart: 64x64 pixels to 8x8x4 latents.

python -m train.autoencoder --config configs/clips_autoencoder.py --workdir runs/clips/autoencoder \
    --data.path VIDEOS

Measured on three videos of about 2 s: 33.0 dB on their frames after 800 steps, 17 minutes
on half of one CPU core.
"""

import dataclasses

from configs import shapes_autoencoder
from dicode_jax.data.config import DataConfig
from dicode_jax.stages.config import AutoencoderTrainConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> AutoencoderTrainConfig:
    config = shapes_autoencoder.get_config()
    return dataclasses.replace(
        config,
        data=DataConfig(path="videos", validation=0.0),
        model=dataclasses.replace(config.model, z_channels=4, embed_dim=4),
        optim=OptimConfig(optimizer="muon", lr=3e-3, warmup_steps=50, weight_decay=0.0),
        num_steps=800,
        batch_size=8,
        kl_weight=1e-4,
        ema_decay=0.99,
    )
