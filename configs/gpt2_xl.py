r"""Deep tokens after text with GPT-2 XL (1.56B).

python -m train.ar --config configs/gpt2_xl.py
python -m train.encode --config configs/gpt2_xl.py --tokenizer TOKENIZER --data.path VIDEOS \
    --out cache
python -m train.ar --config configs/gpt2_xl.py --tokenizer TOKENIZER --data.path cache \
    --workdir runs/mine --body-init gpt2-xl

The first takes what it needs from the package: the drawn world and its tokenizer.

1,617,043,984 parameters. Not trained here yet: it needs accelerators. Optimiser, batch and length
are ours.
"""

from configs import language_models
from dicode_jax.stages.dicode.configs import ARTrainConfig


def get_config() -> ARTrainConfig:
    return language_models.gpt2(num_layers=48, num_heads=25, embed_dim=1600, lr=2e-4)
