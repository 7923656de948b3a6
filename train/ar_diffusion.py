"""Trains AR-Diffusion's denoiser on latents of a frozen frame VAE.

python -m train.ar_diffusion --config configs/ar_diffusion/sky_dit.py --vae runs/vae/model \
    --data.path cache --workdir runs/dit
"""

import dataclasses
import functools
import pathlib
import sys

import numpy as np
from flax import nnx

from dicode_jax.data.stream import BatchStream, RecordExamples
from dicode_jax.stages import parts
from dicode_jax.stages.ar_diffusion import dit
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig
from dicode_jax.stages.ar_diffusion.examples import ClassedClips, classes_of, open_latents
from dicode_jax.stages.registry import build_stage
from dicode_jax.training.evaluate import jit_local, look
from dicode_jax.training.stage import Stage
from train import data, loop
from train.cache import cached_batches
from train.sources import find_sources

ENCODED_TOGETHER = 8  # clips per call when they are cached
SHEET_ROWS = 6


def build(config: DiTTrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains the denoiser of AR-Diffusion."""
    config = dit.settle(find_sources(config))
    stage, encode = build_stage(config), lambda batch: batch
    if config.data.kind == "cache":
        splits = data.make_splits(config, functools.partial(open_latents, config))
        # Judged by first clips alone, of training data too where nothing is held out.
        first_clips = dataclasses.replace(splits.held_out, late_share=0.0)
        splits = dataclasses.replace(splits, held_out=first_clips)
        batches = data.train_stream(config, splits.train)
    else:
        encode = Encode(config)
        read = ClassedClips(
            data=config.data, frame_size=config.frame_size, classes=classes_of(config)
        )
        splits = data.open_splits(config, read, images=False)
        batches = cached_clips(stage, splits.train, encode, workdir)
    validation_loss = functools.partial(dit.loss_fn, config, deterministic=True)
    return loop.Task(
        stage=stage,
        batches=batches,
        evaluate=data.evaluation(config, validation_loss, splits.held_out, encode),
        sample=make_sample(config, encode, splits.held_out),
        units={"clips": config.batch_size},
    )


class Encode:
    """Turns the clips of a batch into latents, by the frozen VAE alone."""

    def __init__(self, config: DiTTrainConfig):
        self._vae, self._encode = parts.on_device(dit.load_vae(config)), jit_local(dit.encode)

    def __call__(self, batch: data.Batch) -> dict[str, np.ndarray]:
        """The batch with `latents` in place of `video`."""
        return {
            "latents": self._encode(self._vae, batch["video"]),
            "classes": batch["classes"],
        }


def cached_clips(
    stage: Stage, examples: RecordExamples, encode: Encode, workdir: pathlib.Path
) -> BatchStream:
    """Batches of clips that are encoded once."""
    config = stage.config
    return cached_batches(
        workdir,
        stage,
        examples,
        encode,
        source=examples.source,
        count=config.cached_clips,
        together=ENCODED_TOGETHER,
        encoder=[pathlib.Path(config.vae)],
        settings={
            "dtype": config.dtype,
            "num_classes": config.model.num_classes,
            "class_names": config.class_names,
            "class_of": config.class_of,
        },
    )


def make_sample(config: DiTTrainConfig, encode, examples):
    """Sample sheets of the classes of held-out clips, below these; None without a VAE."""
    if config.vae is None:
        return None
    batch = encode(data.held_out_examples(config, examples, SHEET_ROWS))
    vae = parts.on_device(dit.load_vae(config))
    generate, show = look(functools.partial(dit.generate, config)), jit_local(dit.show)
    truth, classes = show(vae, batch["latents"]), batch["classes"]
    names = config.class_names or [f"class {i}" for i in range(config.model.num_classes)] or [""]

    def paint(model: nnx.Module) -> tuple[list[np.ndarray], list[str]]:
        made = show(vae, generate(model, classes))
        rows = [row for pair in zip(truth, made, strict=True) for row in pair]
        return rows, [f"{names[i]} {what}".strip() for i in classes for what in ("true", "made")]

    return data.sheets(paint)


if __name__ == "__main__":
    options = {"settle": dit.settle, "build_stage": build_stage}
    sys.exit(loop.main("train.ar_diffusion", build, (DiTTrainConfig,), **options))
