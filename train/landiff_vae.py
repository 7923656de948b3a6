"""Trains the causal autoencoder of videos that LanDiff paints with.

python -m train.landiff_vae --config configs/landiff/shapes_vae.py --workdir runs/landiff_vae
"""

import dataclasses
import pathlib
import sys

import numpy as np

from dicode_jax.stages import latents
from dicode_jax.stages.dicode.reading import settle
from dicode_jax.stages.landiff import vae3d
from dicode_jax.stages.landiff.config import VAE3DTrainConfig
from dicode_jax.stages.registry import build_stage
from dicode_jax.training.evaluate import look
from train import data, loop


def build(config: VAE3DTrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains the causal autoencoder of LanDiff on clips."""
    stage = build_stage(config)
    reconstruct = look(lambda model, video: latents.reconstruct(model.vae, video))
    learned = data.open_splits(config, vae3d.reader(config, config.crop_size), images=False)
    whole = dataclasses.replace(learned.held_out, read=vae3d.reader(config))
    (clip,) = data.held_out_examples(config, whole, 1)["video"]
    return loop.Task(
        stage=stage,
        batches=data.train_stream(config, learned.train),
        evaluate=data.evaluation(config, stage.loss_fn, whole),
        sample=data.sheets(
            lambda model: (
                [clip, np.asarray(reconstruct(model, clip[None]))[0]],
                ["frames", "reconstructed"],
            )
        ),
        units={"clips": config.batch_size},
    )


if __name__ == "__main__":
    options = {"settle": settle, "build_stage": build_stage}
    sys.exit(loop.main("train.landiff_vae", build, (VAE3DTrainConfig,), **options))
