"""Frame VAE of AR-Diffusion on TaiChi-HD. Not measured.

python -m train.ar_diffusion_vae --config configs/ar_diffusion/taichi_vae.py --data.path VIDEOS \
    --workdir runs/vae
"""

from configs.ar_diffusion.released_vae import image_vae
from dicode_jax.stages.ar_diffusion.config import FrameVAETrainConfig


def get_config() -> FrameVAETrainConfig:
    return image_vae(1e-4, 50_000)
