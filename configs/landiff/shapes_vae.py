"""Causal autoencoder of the small LanDiff: 17 frames of 64x64 pixels to 5 latents of 16x16x8.

python -m train.landiff_vae --config configs/landiff/shapes_vae.py --workdir runs/landiff_vae

Whole frames, nine of two clips at a time: random squares are often of one colour alone, which norms
take away, and cost what whole frames cost. The caches of decoding learn more of their work in a
second, shorter run:

python -m train.landiff_vae --config configs/landiff/shapes_vae.py --init runs/landiff_vae/model \
    --data.num-frames 17 --batch-size 1 --num-steps 300 --optim.lr 1e-3 \
    --workdir runs/landiff_vae_long

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
            num_groups=2,
        ),
        optim=OptimConfig(optimizer="muon", lr=4e-3, warmup_steps=50, weight_decay=0.0),
        num_steps=1500,
        batch_size=2,
        ema_decay=0.998,
        validation_examples=16,
    )
