"""Trains the KL-VAE on frames.

python -m train.autoencoder --config configs/shapes_autoencoder.py --workdir runs/autoencoder
"""

import pathlib
import sys

from dicode_jax.data.examples import FrameReader
from dicode_jax.stages import autoencoder
from dicode_jax.stages.config import AutoencoderTrainConfig
from dicode_jax.stages.dicode.reading import settle
from dicode_jax.stages.registry import build_stage
from dicode_jax.training.evaluate import look
from train import data, loop


def build(config: AutoencoderTrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains the KL-VAE that maps frames to latents."""
    stage = build_stage(config)
    read = FrameReader(data=config.data, frame_size=config.frame_size)
    splits = data.open_splits(config, read)
    images = data.held_out_examples(config, splits.held_out, 12)["image"]
    reconstruct = look(autoencoder.reconstruct)
    return loop.Task(
        stage=stage,
        batches=data.train_stream(config, splits.train),
        evaluate=data.evaluation(config, stage.loss_fn, splits.held_out),
        sample=data.image_sheets(
            lambda *args: reconstruct(*args)[1], images, ["frames", "reconstructed"]
        ),
        units={"frames": config.batch_size},
    )


if __name__ == "__main__":
    sys.exit(loop.main("train.autoencoder", build, (AutoencoderTrainConfig,), settle=settle))
