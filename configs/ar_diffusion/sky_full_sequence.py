"""One noise level for all frames, on Sky-Timelapse: a baseline of AR-Diffusion. Not measured.

python -m train.ar_diffusion --config configs/ar_diffusion/sky_full_sequence.py \
    --vae runs/vae/model --workdir runs/dit
"""

from configs.ar_diffusion import released_dit
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig


def get_config() -> DiTTrainConfig:
    return released_dit.baseline("sky", "shared")
