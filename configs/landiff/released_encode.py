"""Codes, latents, motion and text of six seconds each, for LanDiff at the release's sizes.

python -m train.encode --config configs/landiff/released_encode.py --data.path VIDEOS \
    --tokenizer models/landiff --vae models/landiff/vae --lm-text models/landiff \
    --dit-text models/landiff --out cache

Captions are cut at the 256 tokens that released_lm.py reads. Not run at this size.
"""

from dicode_jax.data.config import DataConfig
from dicode_jax.stages.landiff.config import EncodeConfig


def get_config() -> EncodeConfig:
    return EncodeConfig(
        data=DataConfig(path="videos", num_frames=49, resize="crop"),
        frame_size=480,
        frame_width=720,
        lm_text_length=256,
        dtype="bfloat16",
    )
