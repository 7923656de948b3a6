"""Theia's backbone: arrays of transformers' `ViTModel` with random weights, not of Theia's own."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from convert import from_torch
from dicode_jax.models.landiff.features import vit_features
from dicode_jax.models.vit import ViTConfig
from parity.harness import Check, runner
from parity.runners.gpt2 import require_all

BOUND = {"atol": 2e-5}
NAMES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}


@runner("landiff/theia")
def run_theia(fixture):
    inputs, want = fixture.npz("inputs"), fixture.npz("outputs")
    cfg = ViTConfig(**{ours: fixture.config[name] for ours, name in NAMES.items()})
    vit = from_torch("landiff_theia", fixture.npz("weights"), cfg)
    video = jnp.asarray(inputs["video"], jnp.float32) / 127.5 - 1
    side = max(video.shape[2:4]) // cfg.patch_size
    features = vit_features(vit, video)
    got = {
        "last_hidden_state": vit(jnp.asarray(rearrange(inputs["images"], "b c h w -> b h w c"))),
        "positions": vit.positions(side, side)[None],
        "features": rearrange(np.asarray(features), "b f y x c -> b f c y x"),
    }
    require_all(want, got)
    for name, array in got.items():
        yield Check(name, np.asarray(array), want[name], **BOUND)
