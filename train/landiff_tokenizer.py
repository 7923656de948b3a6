"""Trains LanDiff's semantic tokenizer on features of a frozen encoder.

python -m train.landiff_tokenizer --config configs/landiff/shapes_tokenizer.py \
    --workdir runs/landiff_tokenizer
"""

import pathlib
import sys

import numpy as np

from dicode_jax.models.landiff.features import STRIDE
from dicode_jax.stages.dicode.reading import settle
from dicode_jax.stages.landiff import semantic_tokenizer
from dicode_jax.stages.landiff.config import SemanticTokenizerTrainConfig
from dicode_jax.stages.registry import build_stage
from dicode_jax.training.evaluate import look
from train import data, loop


def build(config: SemanticTokenizerTrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains the semantic tokenizer of LanDiff on features of clips."""
    stage, reconstruct = build_stage(config), look(semantic_tokenizer.reconstruct)
    splits = data.open_splits(config, semantic_tokenizer.reader(config), images=False)
    (clip,) = data.held_out_examples(config, splits.held_out, 1)["video"]

    def paint(model):
        features = (np.asarray(x)[0] for x in reconstruct(model, clip[None]))
        rows = [clip[::STRIDE], *colours(*features, config.frame_shape)]
        return rows, ["frames", "features", "reconstructed"]

    return loop.Task(
        stage=stage,
        batches=data.train_stream(config, splits.train),
        evaluate=data.evaluation(config, stage.loss_fn, splits.held_out),
        sample=data.sheets(paint),
        units={"clips": config.batch_size},
    )


def colours(wanted: np.ndarray, made: np.ndarray, shape: tuple[int, int]) -> list[np.ndarray]:
    """Features [g, y, x, c] as frames uint8 [g, h, w, 3]: what the first varies most in."""
    flat = wanted.reshape(-1, wanted.shape[-1])
    _, _, directions = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    low, high = np.quantile(flat @ directions[:3].T, (0.02, 0.98), axis=0)
    frames = []
    for features in (wanted, made):
        seen = (features @ directions[:3].T - low) / np.maximum(high - low, 1e-6)
        seen = np.rint(255 * np.clip(seen, 0, 1)).astype(np.uint8)
        rows, columns = (np.arange(m) * n // m for m, n in zip(shape, seen.shape[1:3]))
        frames.append(seen[:, rows][:, :, columns])
    return frames


if __name__ == "__main__":
    options = {"settle": settle, "build_stage": build_stage}
    kinds = (SemanticTokenizerTrainConfig,)
    sys.exit(loop.main("train.landiff_tokenizer", build, kinds, **options))
