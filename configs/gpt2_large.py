"""DiCoDe's released language model: GPT-2 large on 16 deep tokens of width 1024 per keyframe.

python -m train.ar --config configs/gpt2_large.py --workdir runs/gpt2_large --tokenizer MODEL_FOLDER

820,763,624 parameters: GPT-2 774,114,560, input MLP 2,951,680, output MLP 43,635,984 and the tables
of keyframes and places 61,440. Not trained here yet: it needs accelerators. Optimiser, batch and
length are ours; the release does not say.
"""

from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.stages.configs import ARTrainConfig
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.training.optim import OptimConfig


def get_config() -> ARTrainConfig:
    return ARTrainConfig(
        model=DiCoDeLMConfig(
            body=GPT2Config(
                num_layers=36,
                num_heads=20,
                embed_dim=1280,
                vocab_size=50323,  # 50257 of GPT-2 and 66 image tokens
                dropout=0.1,
                scan_layers=True,
                remat=True,
            )
        ),
        text_length=80,
        num_keyframes=25,
        optim=OptimConfig(lr=3e-4, warmup_steps=2_000, weight_decay=0.1),
        num_steps=100_000,
        batch_size=256,
        frame_size=256,
    )
