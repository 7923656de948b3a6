r"""Deep tokens after text with GPT-2 medium (355M).

python -m train.ar --config configs/gpt2_medium.py
python -m train.encode --config configs/gpt2_medium.py --tokenizer TOKENIZER --data.path VIDEOS \
    --out cache
python -m train.ar --config configs/gpt2_medium.py --tokenizer TOKENIZER --data.path cache \
    --workdir runs/mine --body-init gpt2-medium

The first takes what it needs from the package: the drawn world and its tokenizer.

391,692,304 parameters. Not trained here yet: it needs accelerators. Optimiser, batch and length
are ours.
"""

from configs import language_models
from dicode_jax.stages.dicode.configs import ARTrainConfig


def get_config() -> ARTrainConfig:
    return language_models.gpt2(num_layers=24, num_heads=16, embed_dim=1024, lr=4e-4)
