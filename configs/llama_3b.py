r"""Deep tokens after text with Llama 3.2 3B; tokens and head as in the release.

python -m train.ar --config configs/llama_3b.py
python -m train.encode --config configs/llama_3b.py --tokenizer TOKENIZER --data.path VIDEOS \
    --out cache
python -m train.ar --config configs/llama_3b.py --tokenizer TOKENIZER --data.path cache \
    --workdir runs/mine --body-init meta-llama/Llama-3.2-3B

The first takes what it needs from the package: the drawn world and its tokenizer.

3,335,874,576 parameters: Llama 3,212,952,576, input MLP 12,589,056, output MLP 110,185,488 and the
tables of keyframes and places 147,456. Not trained here yet: it needs accelerators. The paper
trains such a model but releases neither its weights nor its settings: optimiser, batch and length
are ours.
"""

from configs import language_models
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.stages.dicode.configs import ARTrainConfig


def get_config() -> ARTrainConfig:
    body = LlamaConfig(
        num_layers=28,
        num_heads=24,
        embed_dim=3072,
        vocab_size=language_models.LLAMA_VOCAB_SIZE,
        scan_layers=True,
        remat="full",
    )
    return language_models.llama(body, lr=5e-5)
