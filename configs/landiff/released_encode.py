"""Codes, latents and motion of six seconds each, for LanDiff at the release's sizes. Not measured.

python -m train.encode --config configs/landiff/released_encode.py --data.path VIDEOS \
    --tokenizer models/landiff --vae models/landiff/vae --out cache

Frames are squares, see released_tokenizer.py.
"""

from dicode_jax.data.config import DataConfig
from dicode_jax.stages.landiff.config import EncodeConfig


def get_config() -> EncodeConfig:
    return EncodeConfig(
        data=DataConfig(path="videos", num_frames=49, resize="crop"),
        frame_size=480,
        dtype="bfloat16",
    )
