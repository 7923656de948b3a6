"""Causal autoencoder of LanDiff's sizes, which are CogVideoX-2b's. Not measured.

python -m train.landiff_vae --config configs/landiff/released_vae.py --data.path VIDEOS \
    --lpips converted/lpips --workdir runs/landiff_vae

Sizes are the release's. It trains no autoencoder: all that is said of the training is ours, and
there is no discriminator. `python -m convert ar_diffusion --lpips` makes the folder for --lpips.
"""

from dicode_jax.data.config import DataConfig
from dicode_jax.stages.landiff.config import VAE3DTrainConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> VAE3DTrainConfig:
    return VAE3DTrainConfig(
        data=DataConfig(path="videos", num_frames=17, resize="crop"),
        frame_size=256,
        optim=OptimConfig(lr=1e-4, warmup_steps=1000, schedule="constant", weight_decay=0.0),
        num_steps=500_000,
        batch_size=32,
        ema_decay=0.999,
        dtype="bfloat16",
    )
