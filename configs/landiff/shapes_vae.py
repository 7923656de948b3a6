"""Causal autoencoder of the small LanDiff: 17 frames of 64x64 pixels to 5 latents of 16x16x8.

python -m train.landiff_vae --config configs/landiff/shapes_vae.py --workdir runs/landiff_vae

Squares of 32 pixels of nine frames, of eight clips at a time, cost what one whole clip does: nearly
all of the work is convolutions at full resolution, without which the small image autoencoder came
out 3 dB worse. The norms then see whole clips in a second, shorter run, at a lower rate:

python -m train.landiff_vae --config configs/landiff/shapes_vae.py --init runs/landiff_vae/model \
    --crop-size None --data.num-frames 17 --batch-size 1 --num-steps 400 --optim.lr 2e-3 \
    --workdir runs/landiff_vae_whole

Four channels, four clips of 17 frames and a rate of 5e-3 were at 25 dB after 1,000 steps.

Not trained to its end yet.
"""

from dicode_jax.data.config import DataConfig
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3DConfig
from dicode_jax.stages.landiff.config import VAE3DTrainConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> VAE3DTrainConfig:
    return VAE3DTrainConfig(
        data=DataConfig(num_frames=9),
        model=AutoencoderCausal3DConfig(
            channels=16,
            encoder_mult=(1, 2, 2),
            decoder_mult=(1, 2, 3),
            encoder_blocks=1,
            decoder_blocks=1,
            z_channels=8,
            num_groups=4,
        ),
        optim=OptimConfig(optimizer="muon", lr=4e-3, warmup_steps=50, weight_decay=0.0),
        num_steps=1600,
        batch_size=8,
        crop_size=32,
        ema_decay=0.998,
        validation_examples=16,
    )
