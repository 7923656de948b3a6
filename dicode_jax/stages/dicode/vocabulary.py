"""The vocabulary of a language model that is told none: of the weights it starts from, or learnt.

It lies in the folder of the run, which goes on and is exported with it whatever the captions are by
then. The synthetic world has its own and is no matter of this file.
"""

import contextlib
import dataclasses
import logging
import pathlib
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.experimental import multihost_utils

from dicode_jax.data.encoded_cache import EncodedCache
from dicode_jax.data.records import BrokenRecord, in_validation, name_hash
from dicode_jax.data.sources.open import kind_of, open_source
from dicode_jax.text.gpt import IMAGE_TOKENS, TOKENIZER_FILE, TextTokenizer, learn
from dicode_jax.training.workdir import has_begun

if TYPE_CHECKING:
    from dicode_jax.stages.dicode.configs import ARTrainConfig

_log = logging.getLogger(__name__)
SMALLEST_BOUND = 1024  # of a learnt base vocabulary, where the config's body has a smaller one
MOST_RECORDS = 10_000  # that a vocabulary is learnt from


def text_of(config: "ARTrainConfig") -> TextTokenizer:
    """The vocabulary that a config names or starts from; without one, one learnt of the captions.

    Raises:
      UserError: The folder that the config names or starts from holds none, or the data cannot be
        opened.
    """
    if config.text_tokenizer is not None:
        return TextTokenizer.from_file(config.text_tokenizer)
    start = config.init or config.body_init
    if start is None:
        bound = max(config.model.body.vocab_size - len(IMAGE_TOKENS), SMALLEST_BOUND)
        return learn(captions_of(config), vocab_size=bound)
    beside = pathlib.Path(start).parent / "text"  # in the folder of a pipeline
    is_beside = beside.is_dir() and not (pathlib.Path(start) / TOKENIZER_FILE).is_file()
    return TextTokenizer.from_file(beside if is_beside else start)


def with_ids(config: "ARTrainConfig", text: TextTokenizer) -> "ARTrainConfig":
    """The config with the vocabulary's ids for padding and `<img>`, and room for all of it."""
    size = max(config.model.body.vocab_size, text.vocab_size)
    body = dataclasses.replace(config.model.body, vocab_size=size)
    ids = {"pad_token_id": text.pad_id, "image_token_id": text.image_start_id}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, body=body, **ids))


def captions_of(config: "ARTrainConfig") -> list[str]:
    """Captions that are not held out, sorted: of 10,000 records evenly spread, or of all.

    Raises:
      UserError: The data cannot be opened.
    """
    if kind_of(config.data) == "cache":
        cache = EncodedCache(config.data.path)
        count, read, name = len(cache), cache.__getitem__, cache.names.__getitem__
    else:
        source = open_source(config.data, split="all", seed=config.seed)
        count, read, name = len(source), source.record, source.canonical_name
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST_RECORDS)).astype(int)).tolist()
    hashes = np.array([name_hash(name(i)) for i in chosen], np.uint64)
    captions = []
    for i, is_held_out in zip(chosen, in_validation(hashes, config.data.validation), strict=True):
        if not is_held_out:
            with contextlib.suppress(BrokenRecord):  # named when it is read for training
                captions += read(i).captions
    return sorted(captions)


def find_text(config: "ARTrainConfig", workdir: pathlib.Path) -> TextTokenizer | None:
    """The vocabulary that the run in `workdir` has, or will have; nothing is written.

    None where it is not found but given: by `text_tokenizer`, or for the synthetic world.
    """
    is_worlds = config.body_init is None and _is_world(config)
    if config.text_tokenizer is not None or is_worlds:
        return None
    if not has_begun(workdir):
        return text_of(config)
    kept = workdir / TOKENIZER_FILE  # the last release had none but the world's
    return TextTokenizer.from_file(kept) if kept.is_file() else None


def keep_text(config: "ARTrainConfig", workdir: pathlib.Path) -> "ARTrainConfig":
    """Puts the vocabulary that was found into the run's folder; the config then names that file.

    All processes of the run call it, and see the folder. When the captions have changed since, a
    line says so.
    """
    text = find_text(config, workdir)
    if text is None:
        return config
    if jax.process_index() == 0:
        if not has_begun(workdir):
            text.save(workdir)
        elif _has_changed(config, text):
            _log.warning(
                "the captions of %s are others than those that this run learnt its vocabulary "
                "from: it goes on with that one, which spells any text; another --workdir learns "
                "a new one",
                config.data.path,
            )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"vocabulary of {workdir}")
    return with_kept_text(config, workdir)


def with_kept_text(config: "ARTrainConfig", workdir: pathlib.Path) -> "ARTrainConfig":
    """The config with the vocabulary in the run's folder, if it names none and there is one."""
    kept = workdir / TOKENIZER_FILE
    if config.text_tokenizer is not None or not kept.is_file():
        return config
    return dataclasses.replace(config, text_tokenizer=str(kept))


def _has_changed(config: "ARTrainConfig", text: TextTokenizer) -> bool:
    """Whether the captions would give another vocabulary now. Those of a cache do not change."""
    if kind_of(config.data) == "cache":
        return False
    return text_of(config).to_json() != text.to_json()


def _is_world(config: "ARTrainConfig") -> bool:
    if kind_of(config.data) != "cache":
        return kind_of(config.data) == "shapes"
    return EncodedCache(config.data.path).setting("data.path") == "shapes"
