"""Temporal decoder of AR-Diffusion's VAE on Sky-Timelapse, from a trained frame VAE. Not measured.

python -m train.ar_diffusion_vae --config configs/ar_diffusion/sky_vae_time.py --data.path VIDEOS \
    --init runs/vae/model --workdir runs/vae_time
"""

import dataclasses

from configs.ar_diffusion.released_vae import data, image_vae, optim
from dicode_jax.stages.ar_diffusion.config import FrameVAETrainConfig


def get_config() -> FrameVAETrainConfig:
    frames = image_vae(1e-6, None)
    return dataclasses.replace(
        frames,
        model=dataclasses.replace(frames.model, temporal=True),
        init="runs/vae/model",
        data=data(num_frames=16),
        optim=optim(1e-6, accumulate_steps=4, clip_norm=0.0),
        batch_size=4,
    )
