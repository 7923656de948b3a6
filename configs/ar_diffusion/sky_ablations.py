"""The ladder of AR-Diffusion's ablations on Sky-Timelapse. Not measured.

The base is the model with rotary positions and norms on queries and keys. Each rung keeps what
those before it changed; the third and fourth only differ in their VAE, and the last three have that
of the fourth.

python -m train.ar_diffusion --config configs/ar_diffusion/sky_ablations.py --workdir runs/base
python -m train.ar_diffusion --config configs/ar_diffusion/sky_ablations.py --workdir runs/base-1 \
    --model.dit.no-rotary --model.dit.no-qk-norm
python -m train.ar_diffusion --config configs/ar_diffusion/sky_ablations.py --workdir runs/base-2 \
    --model.dit.no-rotary --model.dit.no-qk-norm --timesteps uniform_paths
python -m train.ar_diffusion --config configs/ar_diffusion/sky_ablations.py --workdir runs/base-3 \
    --model.dit.no-rotary --model.dit.no-qk-norm --timesteps uniform_paths --model.dit.mask none
python -m train.ar_diffusion --config configs/ar_diffusion/sky_ablations.py --workdir runs/base-4 \
    --model.dit.no-rotary --model.dit.no-qk-norm --timesteps uniform_paths --model.dit.mask none \
    --vae runs/vae_kl10/model
python -m train.ar_diffusion --config configs/ar_diffusion/sky_ablations.py --workdir runs/base-5 \
    --model.dit.no-rotary --model.dit.no-qk-norm --timesteps uniform_paths --model.dit.mask none \
    --vae runs/vae_kl10/model --model.schedule.parameterization eps
python -m train.ar_diffusion --config configs/ar_diffusion/sky_ablations.py --workdir runs/base-6 \
    --model.dit.no-rotary --model.dit.no-qk-norm --timesteps independent --model.dit.mask none \
    --vae runs/vae_kl10/model --model.schedule.parameterization eps
"""

import dataclasses

from configs.ar_diffusion import released_dit
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig


def get_config() -> DiTTrainConfig:
    config = released_dit.with_dit(released_dit.of_set("sky"), rotary=True, qk_norm=True)
    return dataclasses.replace(config, vae="runs/vae/model")
