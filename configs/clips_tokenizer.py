"""Clip decoder for a few videos that are learned by heart: 16 frames from two keyframes' tokens.

python -m train.tokenizer --config configs/clips_tokenizer.py --workdir runs/clips/tokenizer \
    --data.path VIDEOS

Measured on three videos: 37, 33 and 30 dB after 600 steps, 27 minutes on half of one CPU core.
"""

import dataclasses

from configs import shapes_tokenizer
from configs.clips_representation import LATENT_HEAD
from dicode_jax.data.config import DataConfig
from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.models.dicode.decoder import ClipDecoderConfig
from dicode_jax.stages.dicode.configs import TokenizerTrainConfig
from dicode_jax.stages.dicode.tokenizer_loss import TokenizerLossConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> TokenizerTrainConfig:
    config = shapes_tokenizer.get_config()
    unet = dataclasses.replace(config.decoder.unet, in_channels=8, out_channels=4)
    return dataclasses.replace(
        config,
        data=DataConfig(path="videos", validation=0.0, clip_start="start"),
        decoder=ClipDecoderConfig(
            unet=unet,
            autoencoder=AutoencoderKLConfig(num_groups=8, resolution=64),
            latent_head=LATENT_HEAD,
        ),
        loss=TokenizerLossConfig(),
        autoencoder="runs/clips/autoencoder/model",
        representation="runs/clips/representation/model",
        cached_clips=12,
        optim=OptimConfig(optimizer="muon", lr=3e-3, warmup_steps=50, weight_decay=0.0),
        num_steps=600,
        batch_size=6,
        ema_decay=0.99,
    )
