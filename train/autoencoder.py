"""Trains the KL-VAE on frames.

python -m train.autoencoder --config configs/shapes_autoencoder.py --workdir runs/autoencoder
"""

import pathlib
import sys

from dicode_jax.stages import autoencoder
from dicode_jax.stages.config import AutoencoderTrainConfig
from dicode_jax.stages.dicode.reading import settle
from dicode_jax.stages.registry import build_stage
from dicode_jax.training.evaluate import look
from train import data, loop


def build(config: AutoencoderTrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains the KL-VAE that maps frames to latents."""
    reconstruct = look(autoencoder.reconstruct)
    return data.frame_task(
        build_stage(config), lambda *args: reconstruct(*args)[1], ["frames", "reconstructed"]
    )


if __name__ == "__main__":
    kinds = (AutoencoderTrainConfig,)
    options = {"settle": settle, "build_stage": build_stage}
    sys.exit(loop.main("train.autoencoder", build, kinds, **options))
