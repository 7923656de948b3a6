r"""Deep tokens after text with GPT-2 small (124M), the smallest of the paper's range.

python -m train.ar --config configs/gpt2_small.py
python -m train.encode --config configs/gpt2_small.py --tokenizer TOKENIZER --data.path VIDEOS \
    --out cache
python -m train.ar --config configs/gpt2_small.py --tokenizer TOKENIZER --data.path cache \
    --workdir runs/mine --body-init gpt2

The first takes what it needs from the package: the drawn world and its tokenizer.

151,706,640 parameters. Not trained here yet: it needs accelerators. Optimiser, batch and length
are ours.
"""

from configs import language_models
from dicode_jax.stages.dicode.configs import ARTrainConfig


def get_config() -> ARTrainConfig:
    return language_models.gpt2(num_layers=12, num_heads=12, embed_dim=768, lr=6e-4)
