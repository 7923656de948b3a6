"""Trains the language model: from a caption, deep token after deep token.

python -m train.ar --config configs/shapes_ar.py --workdir runs/ar
"""

import dataclasses
import functools
import hashlib
import pathlib
import sys

import numpy as np
from flax import nnx

from dicode_jax.data.stream import BatchStream, Examples
from dicode_jax.stages import parts
from dicode_jax.stages.dicode import language_model
from dicode_jax.stages.dicode.configs import ARTrainConfig
from dicode_jax.stages.dicode.examples import VideoExamples, open_examples
from dicode_jax.stages.dicode.reading import settle
from dicode_jax.stages.dicode.vocabulary import keep_text
from dicode_jax.stages.registry import build_stage
from dicode_jax.text import cut
from dicode_jax.text.gpt import TextTokenizer
from dicode_jax.training.evaluate import jit_local, look
from dicode_jax.training.stage import Stage
from train import data, loop
from train.cache import cached_batches
from train.sources import find_sources, prepare_sources

ENCODED_TOGETHER = 16  # videos per call when they are cached
SHEET_ROWS = 12


def build(config: ARTrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains the language model that writes deep tokens after a caption."""
    config = keep_text(settle(find_sources(config), workdir), workdir)
    config = prepare_sources(config, workdir)
    stage = build_stage(config)
    text = language_model.load_text(config)
    unpacked = dataclasses.replace(config, packed=False)
    if config.packed and config.row_length is None:
        print(f"packed rows have {config.packed_length} positions (--row-length)", flush=True)
    train = open_examples(config, text)
    held_out = open_examples(unpacked, text, split="validation")
    if not len(held_out):
        data.say_nothing_is_held_out(config, len(train))
        held_out = open_examples(unpacked, text)

    encode = lambda batch: batch  # noqa: E731
    if config.cached_videos:
        encode = Encode(config)
        batches = cached_videos(stage, train, encode, workdir)
    else:
        batches = data.train_stream(config, train)
    validation_loss = functools.partial(language_model.loss_fn, config, deterministic=True)
    return loop.Task(
        stage=stage,
        batches=batches,
        evaluate=data.evaluation(config, validation_loss, held_out, encode),
        sample=make_sample(config, text, held_out),
        units=units(config),
    )


class Encode:
    """Turns the keyframes of a batch into deep tokens, by the frozen tokenizer alone."""

    def __init__(self, config: ARTrainConfig):
        self._tokenizer = parts.on_device(language_model.load_tokenizer(config))
        self._encode = jit_local(language_model.encode)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with `tokens` in place of `keyframes`."""
        others = {name: x for name, x in batch.items() if name != "keyframes"}
        return others | {"tokens": self._encode(self._tokenizer, batch["keyframes"])}


def cached_videos(
    stage: Stage, examples: VideoExamples, encode: Encode, workdir: pathlib.Path
) -> BatchStream:
    """Batches of videos that are encoded once."""
    config, text = stage.config, examples.captions.tokenizer
    return cached_batches(
        workdir,
        stage,
        examples,
        encode,
        source=examples.source,
        count=config.cached_videos,
        together=ENCODED_TOGETHER,
        encoder=[config.tokenizer_folder / "tokenizer"],
        settings={
            "caption_dropout": config.caption_dropout,
            "text_tokenizer": hashlib.sha256(text.to_json().encode()).hexdigest(),
        },
    )


def make_sample(config: ARTrainConfig, text: TextTokenizer, examples: Examples):
    """Sample sheets of fixed prompts; None without a decoder that paints."""
    decoder = language_model.load_decoder(config)
    if decoder is None:
        return None
    batch = data.held_out_examples(config, examples, SHEET_ROWS)
    write = look(functools.partial(language_model.generate_tokens, config))
    show = jit_local(functools.partial(language_model.show, config))
    text_ids, truth = batch["text_ids"], batch.get("keyframes")
    if config.sample_prompts:
        encoded = text.encode(list(config.sample_prompts), config.text_length)
        for i in encoded.truncated:
            cut.warn(encoded.left_out[i], encoded.lengths[i], config.text_length, stacklevel=2)
        text_ids, truth = encoded.ids, None
    elif truth is None:
        truth = show(decoder, batch["tokens"].astype(np.float32))

    def paint(model: nnx.Module) -> tuple[list[np.ndarray], list[str]]:
        painted = show(decoder, write(model.lm, text_ids))
        captions = [text.decode(ids) for ids in text_ids]
        if truth is None:
            return list(painted), captions
        rows = [row for pair in zip(truth, painted, strict=True) for row in pair]
        return rows, [f"{caption}: {what}" for caption in captions for what in ("true", "written")]

    return data.sheets(paint)


def units(config: ARTrainConfig) -> dict[str, float]:
    """What a step works off: positions of the body, and videos (packed rows hold several)."""
    if config.packed:
        return {"tokens": config.batch_size * config.packed_length}
    length = config.text_length + config.num_keyframes * (config.model.num_tokens + 1)
    return {"tokens": config.batch_size * length, "videos": config.batch_size}


if __name__ == "__main__":
    kinds = (ARTrainConfig,)
    options = {"settle": settle, "build_stage": build_stage}
    sys.exit(loop.main("train.ar", build, kinds, **options))
