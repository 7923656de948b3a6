"""Codes, latents and motion of ten seconds of the shapes world: four segments and a frame.

python -m train.encode --config configs/landiff/shapes_encode.py \
    --tokenizer runs/landiff_tokenizer/model --vae runs/landiff_vae/model --limit 4000 \
    --out runs/landiff_cache
"""

from dicode_jax.data.config import DataConfig
from dicode_jax.stages.landiff.config import EncodeConfig


def get_config() -> EncodeConfig:
    return EncodeConfig(data=DataConfig(num_frames=81))
