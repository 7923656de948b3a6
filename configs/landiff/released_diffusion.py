"""Control branch of LanDiff's size on CogVideoX-2b: 49 frames of 480x720 from semantic tokens.

python -m train.landiff_diffusion --config configs/landiff/released_diffusion.py \
    --data.path cache --base models/landiff --semantic-tokenizer models/landiff \
    --vae models/landiff --workdir runs/landiff_dit

The release states the models, that the base stays as it is, the loss, and that a tenth of the texts
is zeroed. That the control branch starts as a copy of the base is what its code means to do. It
names 7 known latents of 13 in a comment; in which share of the windows they are clean, optimiser,
batch and length are ours. Not run at this size.
"""

from dicode_jax.data.config import DataConfig
from dicode_jax.models.landiff.dit import DenoiserConfig, DiTConfig
from dicode_jax.runtime.sharding import ShardingConfig
from dicode_jax.stages.landiff.generation_config import DiffusionTrainConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> DiffusionTrainConfig:
    return DiffusionTrainConfig(
        data=DataConfig(path="cache", kind="cache", num_frames=49),
        model=DenoiserConfig(dit=DiTConfig(scan_layers=True, remat="full")),
        base="models/landiff",
        trained="control",
        semantic_tokenizer="models/landiff",
        num_known=7,
        prefix_share=0.5,
        text_dropout=0.1,
        optim=OptimConfig(lr=1e-4, warmup_steps=1000, schedule="constant"),
        num_steps=50_000,
        batch_size=64,
        dtype="bfloat16",
        ema_decay=0.9999,
        sharding=ShardingConfig(data=1, fsdp=-1),
    )
