"""Trains AR-Diffusion's frame VAE, or its temporal decoder.

python -m train.ar_diffusion_vae --config configs/ar_diffusion/taichi_vae.py --workdir runs/vae
"""

import pathlib
import sys

import numpy as np

from dicode_jax.data.examples import ClipReader
from dicode_jax.stages.ar_diffusion import frame_vae
from dicode_jax.stages.ar_diffusion.config import FrameVAETrainConfig
from dicode_jax.stages.dicode.reading import settle
from dicode_jax.stages.registry import build_stage
from dicode_jax.training.evaluate import look
from train import data, loop


def build(config: FrameVAETrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains the frame VAE of AR-Diffusion, or its temporal decoder."""
    stage, reconstruct = build_stage(config), look(frame_vae.reconstruct)
    if not config.model.temporal:
        has_labels = bool(config.probe_weight)
        return data.frame_task(
            stage, reconstruct, ["frames", "reconstructed"], has_labels=has_labels
        )
    clips = ClipReader(data=config.data, frame_size=config.frame_size, fs=None)
    splits = data.open_splits(config, lambda *args: {"video": clips(*args)["video"]}, images=False)
    (clip,) = data.held_out_examples(config, splits.held_out, 1)["video"]
    return loop.Task(
        stage=stage,
        batches=data.train_stream(config, splits.train),
        evaluate=data.evaluation(config, stage.loss_fn, splits.held_out),
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
    sys.exit(loop.main("train.ar_diffusion_vae", build, (FrameVAETrainConfig,), **options))
