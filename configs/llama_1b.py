r"""Deep tokens after text with Llama 3.2 1B; tokens and head as in the release.

python -m train.ar --config configs/llama_1b.py
python -m train.encode --config configs/llama_1b.py --tokenizer TOKENIZER --data.path VIDEOS \
    --out cache
python -m train.ar --config configs/llama_1b.py --tokenizer TOKENIZER --data.path cache \
    --workdir runs/mine --body-init meta-llama/Llama-3.2-1B

The first takes what it needs from the package: the drawn world and its tokenizer.

1,313,714,192 parameters: Llama 1,235,949,568, input MLP 6,295,552, output MLP 71,370,768 and the
tables of keyframes and places 98,304. Not trained here yet: it needs accelerators. The paper trains
such a model but releases neither its weights nor its settings: optimiser, batch and length are
ours.
"""

from configs import language_models
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.stages.dicode.configs import ARTrainConfig


def get_config() -> ARTrainConfig:
    body = LlamaConfig(
        vocab_size=language_models.LLAMA_VOCAB_SIZE,
        scan_layers=True,
        remat="full",
    )
    return language_models.llama(body, lr=1e-4)
