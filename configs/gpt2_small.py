r"""Deep tokens after text with GPT-2 small (124M), the smallest of the paper's range.

python -m convert gpt2 gpt2 --for-dicode --out runs/gpt2_small_body
python -m train.encode --config configs/gpt2_small.py --tokenizer TOKENIZER \
    --data.path VIDEOS --data.kind auto --out cache
python -m train.ar --config configs/gpt2_small.py --workdir runs/gpt2_small --tokenizer TOKENIZER \
    --data.path cache --body-init runs/gpt2_small_body --text-tokenizer runs/gpt2_small_body

151,706,640 parameters. Not trained here yet: it needs accelerators. Optimiser, batch and length
are ours.
"""

from configs import language_models
from dicode_jax.stages.dicode.configs import ARTrainConfig


def get_config() -> ARTrainConfig:
    return language_models.gpt2(num_layers=12, num_heads=12, embed_dim=768, lr=6e-4)
