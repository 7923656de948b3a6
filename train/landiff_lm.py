"""Trains LanDiff's language model on semantic tokens.

python -m train.landiff_lm --config configs/landiff/shapes_lm.py --data.path cache \
    --workdir runs/landiff_lm
"""

import functools
import pathlib
import sys

from dicode_jax.stages.landiff import language_model
from dicode_jax.stages.landiff.generation_config import LMTrainConfig
from dicode_jax.stages.landiff.sequences import open_rows
from dicode_jax.stages.registry import build_stage
from train import data, loop
from train.sources import find_sources


def build(config: LMTrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains the language model of LanDiff."""
    config = language_model.settle(find_sources(config), workdir)
    words = language_model.read_words(config)
    splits = data.make_splits(config, functools.partial(open_rows, config, words))
    loss = functools.partial(language_model.loss_fn, config, deterministic=True)
    return loop.Task(
        stage=build_stage(config),
        batches=data.train_stream(config, splits.train),
        evaluate=data.evaluation(config, loss, splits.held_out),
        units={"tokens": config.batch_size * config.positions},
    )


if __name__ == "__main__":
    options = {"settle": language_model.settle, "build_stage": build_stage}
    sys.exit(loop.main("train.landiff_lm", build, (LMTrainConfig,), **options))
