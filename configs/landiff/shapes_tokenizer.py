"""Semantic tokenizer of the small LanDiff: 17 frames to 128 codes, 64 of the first, 16 of others.

python -m train.landiff_tokenizer --config configs/landiff/shapes_tokenizer.py \
    --workdir runs/landiff_tokenizer

Features are those of the packaged DiCoDe's image tower: 8 x 8 for a frame, of 128 numbers. A batch
has as many tokens as there are codes, where the release has hundreds for each: hence the smaller
revive_below.

Measured in seven runs (README of the packaged model), of which five had half as many codes: by the
error of features alone 0.058 of their variance after 1,800 steps and 37 minutes, but shape lost;
then with probes and patches 0.079, cosine 0.960, shape told in 93 of 100 frames, after 1,365 more
and 21 minutes on a core; then with single frames and clips again 0.050, cosine 0.975, after 4,520
more and 70 minutes; with all codes 0.042, cosine 0.979, after 2,500 more and 45 minutes.
"""

from dicode_jax.data.config import DataConfig
from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizerConfig
from dicode_jax.stages.landiff.config import SemanticTokenizerTrainConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> SemanticTokenizerTrainConfig:
    return SemanticTokenizerTrainConfig(
        data=DataConfig(num_frames=17),
        model=SemanticTokenizerConfig(
            frames=FrameTokens(iframe=64, pframe=16, segment=5),
            grid=(8, 8),
            feature_dim=128,
            embed_dim=128,
            num_layers=3,
            num_heads=4,
            token_dim=64,
            codebook_size=512,
            code_dim=16,
        ),
        optim=OptimConfig(optimizer="muon", lr=3e-3, warmup_steps=100, weight_decay=0.0),
        num_steps=1800,
        batch_size=8,
        revive_below=0.25,
        probe_weight=0.15,
        patch_weight=2.0,
        validation_examples=32,
    )
