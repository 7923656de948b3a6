"""What the configs of full-size language models share: vocabularies, tensor rules, run settings.

The released model is 16 deep tokens of width 1024 per keyframe under a Gaussian mixture of 16. Its
optimiser, batch and length are not known: those here are ours.
"""

from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.runtime.sharding import ShardingConfig
from dicode_jax.stages.dicode.configs import ARTrainConfig
from dicode_jax.training.optim import OptimConfig

GPT2_VOCAB_SIZE = 50_323  # 50257 of GPT-2 and 66 image tokens
LLAMA_VOCAB_SIZE = 128_322  # 128256 of Llama 3 and 66 image tokens

# Matrices into and out of attention and MLPs split over both axes, so that a block needs one sum
# over `tensor` after each; everything else as fsdp does.
RULES = (
    (r"body\.blocks\..*\.(qkv|q|k|v|gate|up)\.kernel$", "fsdp,tensor"),
    (r"body\.blocks\..*\.(out|down)\.kernel$", "tensor,fsdp"),
    (r".*", "fsdp"),
)


def gpt2(*, num_layers: int, num_heads: int, embed_dim: int, lr: float) -> ARTrainConfig:
    """DiCoDe's model with a GPT-2 of these sizes."""
    body = GPT2Config(
        num_layers=num_layers,
        num_heads=num_heads,
        embed_dim=embed_dim,
        vocab_size=GPT2_VOCAB_SIZE,
        dropout=0.1,
        # The original has 0.1 here too, which no fused attention draws: without it a step of GPT-2
        # large moves half the bytes on a GPU (docs/performance.md).
        attention_dropout=0.0,
        scan_layers=True,
        remat="dots_no_batch",
    )
    return train_config(DiCoDeLMConfig(body=body), lr=lr)


def llama(body: LlamaConfig, *, lr: float) -> ARTrainConfig:
    """DiCoDe's model with a Llama 3."""
    model = DiCoDeLMConfig(body=body, image_token_id=128_257, pad_token_id=128_001)
    return train_config(model, lr=lr)


def train_config(model: DiCoDeLMConfig, *, lr: float) -> ARTrainConfig:
    """25 keyframes (48 seconds) after 80 text ids, in bfloat16."""
    return ARTrainConfig(
        model=model,
        text_length=80,
        num_keyframes=25,
        caption_dropout=0.1,
        optim=OptimConfig(lr=lr, warmup_steps=2_000, b2=0.95, weight_decay=0.1),
        num_steps=100_000,
        batch_size=256,
        frame_size=256,
        dtype="bfloat16",
        sharding=ShardingConfig(data=1, fsdp=-1, rules=RULES),
    )
