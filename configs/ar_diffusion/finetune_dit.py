"""AR-Diffusion gone on from at a tenth of its rate, as the release does. Not measured.

The optimiser starts anew. The batch is that of one of the original's devices; other sets take their
own `--clip-step`, `--model.num-classes` and what else their config says.

python -m train.ar_diffusion --config configs/ar_diffusion/finetune_dit.py --init runs/dit/model \
    --vae runs/vae/model --workdir runs/dit_finetuned
"""

import dataclasses

from configs.ar_diffusion import released_dit
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig


def get_config() -> DiTTrainConfig:
    config = released_dit.denoiser(1e-5, clip_step=1, parts=8)
    return dataclasses.replace(config, init="runs/dit/model", num_steps=50_000)
