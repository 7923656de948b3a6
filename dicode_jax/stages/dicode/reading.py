"""What a config leaves to the data and the folders that it names, and how frames become squares.

A tokenizer's config says `resize` and `antialias`; a pipeline reads videos by them, and so must
every training on its tokens.
"""

import dataclasses
import pathlib
from typing import Any

from dicode_jax.data.sources.open import kind_of
from dicode_jax.errors import Faults, UserError
from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
from dicode_jax.stages import parts
from dicode_jax.stages.dicode import configs, found, language_model, vocabulary
from dicode_jax.stages.dicode.representation_model import RepresentationConfig

DEFAULT_RESIZE = "crop"  # where nothing says otherwise


def settle(config: Any, workdir: pathlib.Path | None = None, faults: Faults | None = None) -> Any:
    """The config of a training with all that it leaves to the data and the folders that it names.

    `data.resize` is then as frames will be read, never None: that of the tokenizer whose folder the
    config names, where that one says it. A language model reads with that tokenizer's filter too; a
    tokenizer that goes on learning, with its own.

    Of a language model, `data.kind` says whether `data.path` is a cache; the sizes of deep tokens
    and frames are those of its tokenizer (see `found`), and the ids those of its vocabulary, which
    may be the one that the run in `workdir` learns (see `vocabulary`).

    Args:
      faults: What was found to be wrong before, to be told with the rest.

    Raises:
      UserError: Data, tokenizer or vocabulary are not there, or contradict each other or the
        config; all that is wrong with them is told at once.
    """
    known, faults = faults or Faults(), Faults()
    with faults.gather():
        kind_of(config.data)
    faults.lines += known.lines
    if not isinstance(config, configs.ARTrainConfig):
        with faults.gather():
            config = _with_frames(config)
        faults.tell()
        return config
    config = found.with_world_tokenizer(config)
    for settled in (_with_frames, found.with_sizes):
        with faults.gather():
            config = settled(config)
    with faults.gather():
        text = None if workdir is None else vocabulary.find_text(config, workdir)
        config = vocabulary.with_ids(config, text or language_model.read_text(config))
    faults.tell()
    return config


def _with_frames(config: Any) -> Any:
    data, folder, stored = config.data, *_stored_tokenizer(config)
    said = {"data.resize": data.resize, "the config of the tokenizer": _own_resize(config)}
    if stored is not None:
        said[f"the tokenizer in {folder}"] = stored.resize
    said = {who: resize for who, resize in said.items() if resize is not None}
    if len(set(said.values())) > 1:
        lines = " and ".join(f"{who} says {resize!r}" for who, resize in said.items())
        raise UserError(f"{lines}, but frames are read in one way: leave data.resize out")
    data = dataclasses.replace(data, resize=next(iter(said.values()), DEFAULT_RESIZE))
    if isinstance(config, configs.ARTrainConfig):
        if stored is not None and stored.resize:
            data = dataclasses.replace(data, antialias=stored.antialias)
        if kind_of(data) == "cache":
            if config.cached_videos:
                raise UserError(f"{data.path} is encoded already: leave cached_videos out")
            data = dataclasses.replace(data, kind="cache")
    return dataclasses.replace(config, data=data)


def as_read(config: Any, tokenizer: DeepTokenizerConfig) -> DeepTokenizerConfig:
    """The tokenizer's config with what the run read frames by, as it is exported."""
    data = config.data
    return dataclasses.replace(
        tokenizer, resize=data.resize or DEFAULT_RESIZE, antialias=data.antialias
    )


def _own_resize(config: Any) -> str | None:
    """What the config says of the tokenizer that it trains."""
    if isinstance(config, configs.RepresentationTrainConfig):
        return config.model.tokenizer.resize
    return config.tokenizer.resize if isinstance(config, configs.TokenizerTrainConfig) else None


def _stored_tokenizer(
    config: Any,
) -> tuple[pathlib.Path | None, DeepTokenizerConfig | None]:
    """Folder and config of the tokenizer that a run starts from or stands on, if any."""
    if isinstance(config, configs.ARTrainConfig):
        folder, is_representation = config.tokenizer, False
    elif isinstance(config, configs.TokenizerTrainConfig):
        folder, is_representation = config.init or config.representation, config.init is None
    elif isinstance(config, configs.RepresentationTrainConfig):
        folder, is_representation = config.init, True
    else:
        folder = None
    if folder is None:
        return None, None
    folder = pathlib.Path(folder)
    if is_representation:
        return folder, parts.stored_config(folder, RepresentationConfig).tokenizer
    return folder, parts.stored_config(folder / "tokenizer", DeepTokenizerConfig)
