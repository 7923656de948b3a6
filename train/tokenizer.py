r"""Trains the tokenizer: image tower and resampler by regression, then the clip decoder's UNet.

    python -m train.tokenizer --config configs/shapes_representation.py --workdir runs/repr
    python -m train.tokenizer --config configs/shapes_tokenizer.py --workdir runs/tokenizer
    python -m train.tokenizer --config configs/tokenizer_256.py --workdir runs/tokenizer_256 \
        --init models/start

The first is for small systems that have no pretrained CLIP; the second is the video diffusion
training of the paper, which the third starts from DynamiCrafter's weights.
"""

import functools
import pathlib
import sys
from collections.abc import Callable

import numpy as np
from flax import nnx

from dicode_jax import config as config_lib
from dicode_jax.data.examples import ClipReader
from dicode_jax.data.stream import BatchStream, RecordExamples
from dicode_jax.evaluation.quality import psnr
from dicode_jax.stages.dicode import representation, tokenizer
from dicode_jax.stages.dicode.configs import RepresentationTrainConfig, TokenizerTrainConfig
from dicode_jax.stages.dicode.reading import settle
from dicode_jax.stages.registry import build_stage
from dicode_jax.training.evaluate import jit_local, look
from dicode_jax.training.stage import Stage
from train import data, loop
from train.cache import cached_batches

ENCODED_TOGETHER = 8  # clips per call when they are cached


def build_representation(config: RepresentationTrainConfig) -> loop.Task:
    """Trains image tower and resampler to give keyframes back through the latent head."""
    return data.frame_task(
        build_stage(config),
        look(representation.reconstruct),
        ["keyframes", "read back"],
        has_labels=config.has_labels,
        has_between=config.has_between,
    )


def build_decoder(config: TokenizerTrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains the clip decoder, with the tokenizer or after it."""
    stage = build_stage(config)
    read = ClipReader(data=config.data, frame_size=config.frame_size, fs=config.fs)
    splits = data.open_splits(config, read, images=False)
    if config.cached_clips:
        encode = clip_encoder(config)
        batches = cached_clips(stage, splits.train, workdir, encode)
    else:
        encode = dict  # as they are
        batches = data.train_stream(config, splits.train)

    validation_loss = functools.partial(tokenizer.loss_fn, config, deterministic=True)
    truth = data.held_out_examples(config, splits.held_out, 4)["video"]
    reconstruct = look(functools.partial(tokenizer.reconstruct, config))

    def paint(model: nnx.Module) -> tuple[list[np.ndarray], list[str]]:
        pairs = list(zip(truth, np.asarray(reconstruct(model, truth)), strict=True))
        errors = [f"painted, {psnr(a[None], b[None]):.1f} dB" for a, b in pairs]
        return [row for pair in pairs for row in pair], [x for e in errors for x in ("true", e)]

    return loop.Task(
        stage=stage,
        batches=batches,
        evaluate=data.evaluation(config, validation_loss, splits.held_out, encode),
        sample=data.sheets(paint),
        units={"clips": config.batch_size},
    )


def clip_encoder(config: TokenizerTrainConfig) -> Callable[[data.Batch], data.Batch]:
    """What cached clips, and those held out beside them, are encoded with: frozen parts alone."""
    encoder = tokenizer.load_encoder(config)
    encode = jit_local(functools.partial(tokenizer.encode, config))
    return lambda batch: {**encode(encoder, batch["video"]), "fs": batch["fs"]}


def cached_clips(
    stage: Stage,
    examples: RecordExamples,
    workdir: pathlib.Path,
    encode: Callable[[data.Batch], data.Batch],
) -> BatchStream:
    """Batches of clips that `encode` makes of the examples once."""
    config = stage.config
    return cached_batches(
        workdir,
        stage,
        examples,
        encode,
        source=examples.source,
        count=config.cached_clips,
        together=ENCODED_TOGETHER,
        encoder=tokenizer.encoder_folders(config),
        settings={"fs": config.fs, "tokenizer": config_lib.to_dict(config.tokenizer)},
    )


def build(
    config: RepresentationTrainConfig | TokenizerTrainConfig, workdir: pathlib.Path
) -> loop.Task:
    """Trains the tokenizer: its representation or its clip decoder, as the config says."""
    config = settle(config)
    if isinstance(config, RepresentationTrainConfig):
        return build_representation(config)
    return build_decoder(config, workdir)


if __name__ == "__main__":
    kinds = (RepresentationTrainConfig, TokenizerTrainConfig)
    options = {"settle": settle, "build_stage": build_stage}
    sys.exit(loop.main("train.tokenizer", build, kinds, **options))
