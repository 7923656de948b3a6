"""Trains LanDiff's denoiser on windows of latents and their semantic tokens.

python -m train.landiff_diffusion --config configs/landiff/shapes_diffusion.py \
    --data.path cache --workdir runs/landiff_dit
"""

import functools
import pathlib
import sys

import numpy as np
from flax import nnx

from dicode_jax.stages import parts
from dicode_jax.stages.landiff import diffusion
from dicode_jax.stages.landiff.generation_config import DiffusionTrainConfig
from dicode_jax.stages.landiff.windows import Windows, open_windows
from dicode_jax.stages.registry import build_stage
from dicode_jax.training.evaluate import jit_local, look
from train import data, loop
from train.sources import find_sources

SHEET_ROWS = 4


def build(config: DiffusionTrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains the denoiser of LanDiff."""
    config = diffusion.settle(find_sources(config), workdir)
    words = diffusion.read_words(config)
    splits = data.make_splits(config, functools.partial(open_windows, config, words))
    loss = functools.partial(diffusion.loss_fn, config, deterministic=True)
    return loop.Task(
        stage=build_stage(config),
        batches=data.train_stream(config, splits.train),
        evaluate=data.evaluation(config, loss, splits.held_out),
        sample=make_sample(config, splits.held_out),
        units={"windows": config.batch_size},
    )


def make_sample(config: DiffusionTrainConfig, examples: Windows):
    """Sample sheets of held-out windows, painted from their codes; None without a VAE."""
    if config.vae is None:
        return None
    batch = data.held_out_examples(config, examples, SHEET_ROWS)
    vae, show = parts.on_device(diffusion.load_vae(config)), jit_local(diffusion.show)
    paint, truth = look(functools.partial(diffusion.paint, config)), show(vae, batch["latents"])
    names = [examples.name(i) for i in range(len(truth))]

    def rows(model: nnx.Module) -> tuple[list[np.ndarray], list[str]]:
        made = show(vae, paint(model, batch))
        pairs = [row for pair in zip(truth, made, strict=True) for row in pair]
        return pairs, [f"{name} {what}" for name in names for what in ("true", "made")]

    return data.sheets(rows)


if __name__ == "__main__":
    options = {"settle": diffusion.settle, "build_stage": build_stage}
    sys.exit(loop.main("train.landiff_diffusion", build, (DiffusionTrainConfig,), **options))
