"""Language model of LanDiff's size, on codes of 49 frames and features of a frozen flan-T5 XXL.

python -m train.landiff_lm --config configs/landiff/released_lm.py --data.path cache \
    --semantic-tokenizer models/landiff --workdir runs/landiff_lm

The release states the model, the layout, which tokens count, and that a tenth of the texts is
dropped. Optimiser, batch, length of the run and of the texts are ours. Not run at this size.
"""

import dataclasses

from dicode_jax.data.config import DataConfig
from dicode_jax.models.landiff.language_model import RELEASED_BODY, LanguageModelConfig
from dicode_jax.runtime.sharding import ShardingConfig
from dicode_jax.stages.landiff.generation_config import LMTrainConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> LMTrainConfig:
    body = dataclasses.replace(RELEASED_BODY, scan_layers=True, remat="full")
    return LMTrainConfig(
        data=DataConfig(path="cache", kind="cache", num_frames=49),
        model=LanguageModelConfig(body=body),
        text_length=256,
        text_dropout=0.1,
        optim=OptimConfig(lr=3e-4, b2=0.95, warmup_steps=2000, weight_decay=0.1),
        num_steps=100_000,
        batch_size=256,
        dtype="bfloat16",
        ema_decay=0.9999,
        sharding=ShardingConfig(data=1, fsdp=-1),
    )
