"""Causal autoencoder of the small LanDiff: 17 frames of 64x64 pixels to 5 latents of 16x16x8.

python -m train.landiff_vae --config configs/landiff/shapes_vae.py --data.num-frames 1 \
    --batch-size 16 --num-steps 600 --optim.lr 2.5e-3 --optim.warmup-steps 50 \
    --workdir runs/landiff_images
python -m train.landiff_vae --config configs/landiff/shapes_vae.py \
    --init runs/landiff_images/model --inflate --workdir runs/landiff_vae

Single frames first, of which a batch shows sixteen scenes for what two short clips cost: 22 dB at
step 100 and 36 dB at 550, where clips from the start, of all their frames or of squares, went up
and down between 17 and 26 dB (docs/shapes_models.md).
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
        optim=OptimConfig(optimizer="muon", lr=7e-4, warmup_steps=20, weight_decay=0.0),
        num_steps=480,
        batch_size=2,
        kl_weight=1e-3,
        ema_decay=0.998,
        validation_examples=16,
    )
