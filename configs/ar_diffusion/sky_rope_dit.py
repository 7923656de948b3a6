"""AR-Diffusion on Sky-Timelapse with rotary positions and norms on queries and keys. Not measured.

python -m train.ar_diffusion --config configs/ar_diffusion/sky_rope_dit.py \
    --vae runs/vae/model --workdir runs/dit
"""

from configs.ar_diffusion import released_dit
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig


def get_config() -> DiTTrainConfig:
    return released_dit.with_dit(released_dit.of_set("sky"), rotary=True, qk_norm=True)
