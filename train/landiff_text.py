"""Captions as LanDiff's models read them, through frozen text encoders; see `train.encode`."""

import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np

from dicode_jax.errors import UserError
from dicode_jax.models.t5 import T5Encoder, T5EncoderConfig
from dicode_jax.stages import parts
from dicode_jax.stages.landiff.cached import part_folder
from dicode_jax.stages.landiff.config import EncodeConfig
from dicode_jax.storage import weights
from dicode_jax.text.t5 import T5Tokenizer
from dicode_jax.training.evaluate import jit_local

PARTS = {"lm_text": ("text_encoder",), "dit_text": ("painter_text", "text_encoder")}
STEP = 16  # captions are padded to a multiple, so that few lengths are compiled

Reader = Callable[[str], np.ndarray]


def find(config: EncodeConfig) -> dict[str, pathlib.Path]:
    """Folders of the text encoders that a config names, by the arrays that they make.

    Raises:
      UserError: A folder holds none.
    """
    named = {name: getattr(config, name) for name in PARTS}
    return {
        name: part_folder(folder, *PARTS[name])
        for name, folder in named.items()
        if folder is not None
    }


def widths(folders: Mapping[str, pathlib.Path]) -> dict[str, int]:
    """Numbers of a token's vector, by array."""
    return {
        name: parts.stored_config(folder, T5EncoderConfig).embed_dim
        for name, folder in folders.items()
    }


def load(
    config: EncodeConfig, folders: Mapping[str, pathlib.Path]
) -> Callable[[Sequence[str]], dict[str, np.ndarray]]:
    """What makes arrays bfloat16 [t, e] of the first of a video's captions.

    `lm_text` is what the language model reads: words and their end, padding neither seen nor kept.
    `dit_text` has `dit_text_length` tokens: the denoiser was trained on padding as on words.

    Raises:
      UserError: A vocabulary is missing or larger than the encoder's.
    """
    models, readers = {}, {}
    for name, folder in folders.items():
        if folder not in models:
            models[folder] = _open(config, folder)
        read = _words_reader if name == "lm_text" else _padded_reader
        readers[name] = read(*models[folder], getattr(config, f"{name}_length"))

    def call(captions: Sequence[str]) -> dict[str, np.ndarray]:
        caption = captions[0] if captions else ""
        return {name: read(caption) for name, read in readers.items()}

    return call


def _open(config: EncodeConfig, folder: pathlib.Path) -> tuple[T5Tokenizer, Callable]:
    words = T5Tokenizer.from_file(folder)
    dtype = parts.compute_dtype(config)
    model, cfg = weights.load_module(folder, T5Encoder, T5EncoderConfig, dtype=dtype, on_host=True)
    if words.vocab_size > cfg.vocab_size:
        raise UserError(
            f"the vocabulary in {folder} has {words.vocab_size} words, the encoder's table "
            f"{cfg.vocab_size}"
        )
    run = jit_local(lambda t5, ids, valid: t5(t5.embed_tokens(ids), valid))

    def embed(ids: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
        made = run(model, ids[None], valid)[0]
        if not np.isfinite(made).all():
            raise UserError(
                f"the text encoder in {folder} gives NaN or infinite numbers; look at its weights"
            )
        return made.astype(ml_dtypes.bfloat16)

    return words, embed


def _words_reader(words: T5Tokenizer, embed: Callable, length: int) -> Reader:
    def read(caption: str) -> np.ndarray:
        ids = _ids(words, caption, length)
        padded = _pad(words, ids, len(ids) + -len(ids) % STEP)
        return embed(padded, np.arange(len(padded))[None] < len(ids))[: len(ids)]

    return read


def _padded_reader(words: T5Tokenizer, embed: Callable, length: int) -> Reader:
    return lambda caption: embed(_pad(words, _ids(words, caption, length), length), None)


def _pad(words: T5Tokenizer, ids: np.ndarray, length: int) -> np.ndarray:
    return np.pad(ids, (0, length - len(ids)), constant_values=words.pad_id)


def _ids(words: T5Tokenizer, caption: str, length: int) -> np.ndarray:
    ids = words(caption, length)
    if len(ids) == length and words.left_out(caption, length)[0]:
        # Always in the same words, so that it is said once.
        warnings.warn(f"captions of more than {length} ids are cut there", stacklevel=2)
    return ids
