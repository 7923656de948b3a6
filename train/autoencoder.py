"""Trains the KL-VAE on frames.

python -m train.autoencoder --config configs/shapes_autoencoder.py --workdir runs/autoencoder
"""

import pathlib
import sys

from dicode_jax.stages.config import AutoencoderTrainConfig
from dicode_jax.stages.dicode.reading import settle
from dicode_jax.stages.latents import reconstruct
from dicode_jax.stages.registry import build_stage
from dicode_jax.training.evaluate import look
from train import data, loop


def build(config: AutoencoderTrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains the KL-VAE that maps frames to latents."""
    return data.frame_task(build_stage(config), look(reconstruct), ["frames", "reconstructed"])


if __name__ == "__main__":
    kinds = (AutoencoderTrainConfig,)
    options = {"settle": settle, "build_stage": build_stage}
    sys.exit(loop.main("train.autoencoder", build, kinds, **options))
