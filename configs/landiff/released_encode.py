"""Codes, latents, motion and text of six seconds each, for LanDiff at the release's sizes.

python -m train.encode --config configs/landiff/released_encode.py --data.path VIDEOS \
    --tokenizer models/landiff --vae models/landiff/vae --lm-text models/landiff \
    --dit-text models/landiff --out cache

Not run at this size. Frames are squares, see released_tokenizer.py.
"""

from dicode_jax.data.config import DataConfig
from dicode_jax.stages.landiff.config import EncodeConfig


def get_config() -> EncodeConfig:
    return EncodeConfig(
        data=DataConfig(path="videos", num_frames=49, resize="crop"),
        frame_size=480,
        dtype="bfloat16",
    )
