"""Trains the KL-VAE on frames.

python -m train.autoencoder --config configs/shapes_autoencoder.py --workdir runs/autoencoder
"""

import pathlib
import sys

import jax
import numpy as np
from flax import nnx

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
    splits = data.open_splits(config)
    read = FrameReader(data=config.data, frame_size=config.frame_size)
    images = data.held_out_examples(config, splits.held_out, read, 12)["image"]
    reconstruct = look(autoencoder.reconstruct)

    def sample(model: nnx.Module, folder: pathlib.Path, step: int) -> None:
        from dicode_jax.media.video import contact_sheet

        _, painted = reconstruct(model, images)
        if jax.process_index() == 0:
            rows = [images, np.asarray(painted)]
            contact_sheet(folder / f"{step:06d}.png", rows, labels=["frames", "reconstructed"])

    return loop.Task(
        stage=stage,
        batches=data.train_stream(config, splits.train, read),
        evaluate=data.evaluation(config, stage.loss_fn, splits.held_out, read),
        sample=sample,
        units={"frames": config.batch_size},
    )


if __name__ == "__main__":
    sys.exit(loop.main("train.autoencoder", build, (AutoencoderTrainConfig,), settle=settle))
