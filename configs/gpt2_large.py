r"""DiCoDe's released language model: GPT-2 large on deep tokens of width 1024.

python -m train.ar --config configs/gpt2_large.py
python -m train.encode --config configs/gpt2_large.py --tokenizer TOKENIZER --data.path VIDEOS \
    --out cache
python -m train.ar --config configs/gpt2_large.py --tokenizer TOKENIZER --data.path cache \
    --workdir runs/mine --body-init gpt2-large

The first takes what it needs from the package: the drawn world and its tokenizer.

820,763,664 parameters: GPT-2 774,114,560, input MLP 2,951,680, output MLP 43,635,984 and the tables
of keyframes and places 61,440. Not trained here yet: it needs accelerators. Optimiser, batch and
length are ours.
"""

from configs import language_models
from dicode_jax.stages.dicode.configs import ARTrainConfig


def get_config() -> ARTrainConfig:
    return language_models.gpt2(num_layers=36, num_heads=20, embed_dim=1280, lr=3e-4)
