"""Language model of the small system: captions of the shapes world to deep tokens.

First the first two keyframes, then, from there, four:

python -m train.ar --config configs/shapes_ar.py --workdir runs/ar_pairs
python -m train.ar --config configs/shapes_ar.py --workdir runs/ar --init runs/ar_pairs/model \
    --num-keyframes 4 --cached-videos 16000 --num-steps 2900 --batch-size 32 --optim.lr 4e-3

Measured: loss -2.45 on held-out captions after the first (54 minutes on one CPU core); of four
keyframes -2.46 after 700 steps at 3e-3 and -2.59 after 2200 more at 4e-3 (10 and 19 minutes).
"""

from configs import shapes_parts
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.stages.dicode.configs import ARTrainConfig
from dicode_jax.training.optim import OptimConfig

VOCAB_SIZE = 210  # 144 words, letters and the end of text; 66 image tokens


def get_config() -> ARTrainConfig:
    return ARTrainConfig(
        model=DiCoDeLMConfig(
            body=GPT2Config(
                num_layers=4,
                num_heads=4,
                embed_dim=128,
                max_seq_len=100,
                vocab_size=VOCAB_SIZE,
                dropout=0.0,
            ),
            token_dim=shapes_parts.TOKEN_DIM,
            max_keyframes=4,
            mlp_dim=256,
            pad_token_id=143,
            image_token_id=145,
        ),
        tokenizer="runs/tokenizer/model",
        text_length=32,
        num_keyframes=2,
        cached_videos=40_000,
        optim=OptimConfig(optimizer="muon", lr=6e-3, warmup_steps=100, weight_decay=0.01),
        num_steps=5500,
        batch_size=48,
        ema_decay=0.998,
        logits_temperature=0.3,
    )
