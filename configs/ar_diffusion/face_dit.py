"""AR-Diffusion on FaceForensics. Not measured.

python -m train.ar_diffusion --config configs/ar_diffusion/face_dit.py \
    --vae runs/vae/model --workdir runs/dit
"""

from configs.ar_diffusion import released_dit
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig


def get_config() -> DiTTrainConfig:
    return released_dit.of_set("face")
