"""LanDiff's semantic tokenizer on Theia's features. Not measured.

python -m train.landiff_tokenizer --config configs/landiff/released_tokenizer.py \
    --data.path VIDEOS --features models/landiff/features --workdir runs/landiff_tokenizer

The release's are: sizes, loss, how codes learn, and 130,000 steps, after which its author saw a
mean squared error of about 0.3 in validation. Ours: optimiser, rate and batch.
`python -m convert landiff --theia` writes the folder for --features.
"""

from dicode_jax.data.config import DataConfig
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizerConfig
from dicode_jax.stages.landiff.config import SemanticTokenizerTrainConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> SemanticTokenizerTrainConfig:
    return SemanticTokenizerTrainConfig(
        data=DataConfig(path="videos", num_frames=49, resize="crop"),
        model=SemanticTokenizerConfig(remat=True),
        features="models/landiff/features",
        frame_size=480,
        frame_width=720,
        optim=OptimConfig(lr=1e-4, warmup_steps=1000, weight_decay=0.01),
        num_steps=130_000,
        batch_size=64,
        dtype="bfloat16",
    )
