"""Language model of the small LanDiff: captions of the shapes world to semantic tokens.

python -m train.landiff_lm --config configs/landiff/shapes_lm.py --data.path runs/landiff_cache \
    --semantic-tokenizer runs/landiff_tokenizer/model --workdir runs/landiff_lm

A text encoder learns with it, which the denoiser then reads by. Some sequences end early, so that
shorter videos can be asked for, and some begin at a later segment, so that a video can go on of
which the beginning is no longer seen. Pixels change by 0.009 of their range from frame to frame
here, by 0.024 at most: the scale makes scores from 0 to 0.7 of that.

Measured: held-out cross-entropy 1.09 after 500 steps, 0.73 after 1,000 and 0.66 after 1,500, 46
minutes on a shared core, of codes that had lost the shape; of those of the packaged model, which
say more, 0.86 after 2,800 steps more, and of twice as many 0.83 after another 1,300.
"""

from dicode_jax.data.config import DataConfig
from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.language_model import MARKS, LanguageModelConfig
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.models.t5 import T5EncoderConfig
from dicode_jax.stages.landiff.generation_config import LMTrainConfig
from dicode_jax.training.optim import OptimConfig

CODES = 512
FRAMES = FrameTokens(iframe=64, pframe=16, segment=5)
TEXT = T5EncoderConfig(
    num_layers=2,
    num_heads=4,
    embed_dim=96,
    head_dim=24,
    mlp_dim=192,
    vocab_size=32,
    max_distance=32,
)


def get_config() -> LMTrainConfig:
    return LMTrainConfig(
        data=DataConfig(path="runs/landiff_cache", kind="cache"),
        model=LanguageModelConfig(
            body=LlamaConfig(
                num_layers=6,
                num_heads=5,
                num_kv_heads=5,
                embed_dim=160,
                mlp_dim=432,
                max_seq_len=1024,
                vocab_size=CODES + len(MARKS),
                rope_theta=10_000.0,
                rope_scaling=None,
                rotates_pairs=True,
                activation="tanh_gelu",
                last_norm="layer",
                tie_embeddings=False,
            ),
            frames=FRAMES,
            codebook_size=CODES,
            text_dim=TEXT.embed_dim,
            micro_dim=64,
            sinusoid_dim=32,
        ),
        text=TEXT,
        segments=3,
        cut_share=0.3,
        late_share=0.3,
        motion_scale=30.0,
        text_length=16,
        optim=OptimConfig(
            optimizer="muon", lr=5e-3, warmup_steps=100, schedule="wsd", weight_decay=0.01
        ),
        num_steps=3000,
        batch_size=16,
        ema_decay=0.998,
    )
