"""Diffusion forcing on UCF-101, a baseline of AR-Diffusion. Not measured.

python -m train.ar_diffusion --config configs/ar_diffusion/ucf101_diff_forcing.py \
    --vae runs/vae/model --workdir runs/dit
"""

from configs.ar_diffusion import released_dit
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig


def get_config() -> DiTTrainConfig:
    return released_dit.baseline("ucf101", "independent")
