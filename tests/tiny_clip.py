"""A tiny CLIP under OpenCLIP's names."""

import numpy as np
from tiny import random_module

from convert.parts import clip as open_clip
from convert.to_torch import original_state_dict
from dicode_jax.models.clip import CLIP
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.storage import weights

CONFIG = {
    "embed_dim": 5,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 6, "layers": 2, "head_width": 3},
    "text_cfg": {"context_length": 7, "vocab_size": 11, "width": 4, "layers": 1, "heads": 2},
    "quick_gelu": True,
}


def checkpoint(config):
    cfg = open_clip.config_from_original(config)
    module = random_module(lambda: CLIP(cfg, rngs=ShapeRngs()))
    names = original_state_dict(weights.named_arrays(module), cfg)
    return {key: np.array(read(), order="C") for key, (_, _, read) in names.items()}
