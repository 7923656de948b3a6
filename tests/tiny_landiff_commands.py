"""Command lines of LanDiff's trainings, for tests that kill runs: only what a step needs."""

import dataclasses
import pathlib

from dicode_jax.stages.landiff.config import SemanticTokenizerTrainConfig
from train import landiff_tokenizer, loop


def build(config: SemanticTokenizerTrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains the semantic tokenizer of LanDiff, and looks at nothing else."""
    task = landiff_tokenizer.build(config, workdir)
    return dataclasses.replace(task, evaluate=None, sample=None)


def train_tokenizer(argv: list[str]) -> int:
    kinds = (SemanticTokenizerTrainConfig,)
    return loop.main("tiny_landiff_commands", build, kinds, argv)
