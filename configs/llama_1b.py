r"""Deep tokens after text with Llama 3.2 1B; tokens and head as in the release.

python -m convert.llama HF_FOLDER --for-dicode --out runs/llama_1b_body
python -m train.ar --config configs/llama_1b.py --workdir runs/llama_1b --tokenizer MODEL_FOLDER \
    --body_init runs/llama_1b_body --text_tokenizer runs/llama_1b_body

1,313,714,192 parameters: Llama 1,235,949,568, input MLP 6,295,552, output MLP 71,370,768 and the
tables of keyframes and places 98,304. Not trained here yet: it needs accelerators. The paper trains
such a model but releases neither its weights nor its settings: optimiser, batch and length are
ours.
"""

from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.stages.configs import ARTrainConfig
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> ARTrainConfig:
    return ARTrainConfig(
        model=DiCoDeLMConfig(
            body=LlamaConfig(
                vocab_size=128_322,  # 128256 of Llama 3 and 66 image tokens
                scan_layers=True,
                remat=True,
            ),
            image_token_id=128_257,
            pad_token_id=128_001,
        ),
        text_length=80,
        num_keyframes=25,
        optim=OptimConfig(lr=1e-4, warmup_steps=2_000, weight_decay=0.1),
        num_steps=100_000,
        batch_size=256,
        frame_size=256,
    )
