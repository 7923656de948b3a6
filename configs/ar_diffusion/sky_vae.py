"""Frame VAE of AR-Diffusion on Sky-Timelapse. Not measured.

python -m train.ar_diffusion_vae --config configs/ar_diffusion/sky_vae.py --data.path VIDEOS \
    --workdir runs/vae
"""

from configs.ar_diffusion.released_vae import image_vae
from dicode_jax.stages.ar_diffusion.config import FrameVAETrainConfig


def get_config() -> FrameVAETrainConfig:
    return image_vae(2e-4, 100_000)
