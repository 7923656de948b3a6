"""Prompts to ids for T5's encoder, from `spiece.model` or a `tokenizer.json` with T5's marks.

Sentencepiece's unigram models (Kudo and Richardson, arXiv 1808.06226) are read with protobuf and
run by `tokenizers`, so that nothing else need be installed. Of 4,289 texts, most of them random
letters of all kinds, 3 got other ids than sentencepiece's: a letter between two rare marks was
joined with them. As in transformers, whose tokenizer the original uses, `</s>` in a prompt is the
mark, and not text; the names of T5's hundred gaps (`<extra_id_0>` ...) are text here.
"""

import os
import pathlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers

from dicode_jax.errors import UserError, printable
from dicode_jax.storage.files import atomic_path, read_small
from dicode_jax.text import cut, guard

__all__ = ["END", "PAD", "UNKNOWN", "T5Tokenizer", "learn_words", "read"]

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
TOKENIZER_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "spiece.model"
_WORD_START = "▁"
_UNIGRAM = 1
# What is read of sentencepiece's `ModelProto`: message -> fields (name, number, type, is repeated).
_PROTO = {
    "Piece": (("piece", 1, "STRING", False), ("score", 2, "FLOAT", False)),
    "Trainer": (
        ("model_type", 3, "INT32", False),
        ("byte_fallback", 35, "BOOL", False),
        ("unk_id", 40, "INT32", False),
    ),
    "Normalizer": (("precompiled_charsmap", 2, "BYTES", False),),
    "Model": (
        ("pieces", 1, "Piece", True),
        ("trainer_spec", 2, "Trainer", False),
        ("normalizer_spec", 3, "Normalizer", False),
    ),
}


class T5Tokenizer:
    """Words to ids, with `</s>` behind them.

    Args:
      tokenizer: Knows the words, `<pad>` and `</s>`.

    Attributes:
      pad_id, end_id: Of the marks.
      vocab_size: Number of ids.

    Raises:
      UserError: A mark is missing, or the vocabulary cannot be trusted (see `guard.check`).
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        pad_id, end_id = tokenizer.token_to_id(PAD), tokenizer.token_to_id(END)
        if pad_id is None or end_id is None:
            mark = PAD if pad_id is None else END
            raise UserError(f"the vocabulary has no {mark}, so it is none of T5's kind")
        guard.check(tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.add_special_tokens([PAD, END])
        self._tokenizer = tokenizer
        self.pad_id, self.end_id = pad_id, end_id
        self._unknown_id = tokenizer.token_to_id(UNKNOWN)
        self._is_closed = isinstance(tokenizer.model, models.WordLevel)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "T5Tokenizer":
        """Reads one of the two files, or a folder that holds one; `tokenizer.json` goes first.

        Raises:
          UserError: There is none, or it cannot be read.
        """
        path = pathlib.Path(path)
        names = (TOKENIZER_FILE, SENTENCEPIECE_FILE)
        files = [path / name for name in names] if os.path.isdir(path) else [path]
        for file in filter(os.path.isfile, files):
            with guard.refusing(f"{file} does not hold a readable vocabulary of T5's kind"):
                if file.suffix == ".json":
                    return cls(guard.read_tokenizer(file))
                return cls(from_sentencepiece(read_small(file, guard.MAX_FILE)))
        raise UserError(f"no vocabulary in {path}: want {' or '.join(names)}")

    def check_fit(self, num_rows: int, part: str) -> None:
        """Makes sure that a table has a row for each id.

        Args:
          part: Of which table and vocabulary are.

        Raises:
          UserError: It has fewer.
        """
        if self.vocab_size > num_rows:
            raise UserError(
                f"the vocabulary of {part} has {self.vocab_size} words, its table {num_rows} rows"
            )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json` into a folder."""
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        with atomic_path(pathlib.Path(folder) / TOKENIZER_FILE) as temporary:
            self._tokenizer.save(str(temporary))

    def encode(self, prompt: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a prompt without `</s>`, and where each begins and ends in it.

        Raises:
          UserError: It is very long, or no text, or holds a word that a vocabulary of whole words
            lacks. Of letters that another lacks a warning tells.
        """
        guard.check_length(prompt)
        with guard.refusing("the tokenizer fails at the prompt"):
            found = self._tokenizer.encode(prompt, add_special_tokens=False)
        if self._unknown_id in found.ids:
            spans = [s for i, s in zip(found.ids, found.offsets) if i == self._unknown_id]
            words = dict.fromkeys(prompt[start:end].strip() for start, end in spans)
            shown = printable(", ".join(words), 200)
            if self._is_closed:
                raise UserError(f"the prompt holds words that the model has never seen: {shown}")
            warnings.warn(f"the vocabulary cannot spell, and leaves out: {shown}", stacklevel=3)
        return found.ids, found.offsets

    def left_out(self, prompt: str, length: int) -> tuple[str, int]:
        """The words that `length` ids, `</s>` among them, do not hold, and how many ids it has."""
        ids, offsets = self.encode(prompt)
        return cut.left_out(prompt, offsets, length - 1), len(ids) + 1

    def __call__(self, prompt: str, length: int) -> Int[np.ndarray, " t"]:
        """At most `length` ids int32 of a prompt, `</s>` the last of them; nothing is padded.

        Of what is left out nobody is told; `left_out` names it, `read` warns. Errors are those of
        `encode`.
        """
        ids, _ = self.encode(prompt)
        return np.asarray([*ids[: length - 1], self.end_id], np.int32)


def read(prompt: str, readers: Mapping[str, tuple[T5Tokenizer, int]]) -> list[list[int]]:
    """Ids of a prompt for several readers, `</s>` the last of each, with one warning of all cuts.

    Args:
      readers: Name -> vocabulary, and how many ids it reads.

    Raises:
      UserError: As `T5Tokenizer.encode` does.
    """
    found = {id(words): (words, words.encode(prompt)) for words, _ in readers.values()}
    made, lines, count = [], [], 0
    for name, (words, length) in readers.items():
        ids, offsets = found[id(words)][1]
        made.append([*ids[: length - 1], words.end_id])
        count = max(count, len(ids) + 1)
        if lost := cut.left_out(prompt, offsets, length - 1):
            lost = printable(lost if len(lost) <= 200 else f"{lost[:200]}...")
            lines.append(f"the {name} reads the first {length} and leaves out: {lost}")
    if lines:
        warnings.warn(f"the prompt has {count} tokens; {'; '.join(lines)}", stacklevel=3)
    return made


def learn_words(captions: Iterable[str]) -> T5Tokenizer:
    """A vocabulary of the words of captions, in the order of the alphabet; case does not count."""
    words = sorted({word for caption in captions for word in caption.lower().split()})
    ids = {word: i for i, word in enumerate((PAD, END, UNKNOWN, *words))}
    made = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return T5Tokenizer(made)


def from_sentencepiece(content: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of a unigram model of sentencepiece.

    Raises:
      UserError: It is of another kind.
      Exception: It is none; whatever the libraries raise.
    """
    model = _message("Model").FromString(content)
    trainer = model.trainer_spec
    if not (model.HasField("trainer_spec") and model.HasField("normalizer_spec")):
        raise UserError("it is no whole model of sentencepiece")
    if trainer.model_type not in (0, _UNIGRAM) or trainer.byte_fallback:
        raise UserError("it is no unigram model without bytes, as T5's is")
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    made = tokenizers.Tokenizer(models.Unigram(pieces, trainer.unk_id, False))
    rules: list[Any] = [
        normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        normalizers.Strip(),
    ]
    if charsmap := model.normalizer_spec.precompiled_charsmap:
        rules.insert(0, normalizers.Precompiled(charsmap))
    made.normalizer = normalizers.Sequence(rules)
    scheme = {"replacement": _WORD_START, "prepend_scheme": "always", "split": False}
    made.pre_tokenizer = pre_tokenizers.Metaspace(**scheme)
    made.decoder = decoders.Metaspace(**scheme)
    return made


def _message(name: str) -> Any:
    """The class of a message of `_PROTO`."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="spiece.proto", package="spiece")
    for title, fields in _PROTO.items():
        message = file.message_type.add(name=title)
        for field, number, kind, is_repeated in fields:
            label = kinds.LABEL_REPEATED if is_repeated else kinds.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, label=label)
            if kind in _PROTO:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".spiece.{kind}"
            else:
                added.type = getattr(kinds, f"TYPE_{kind}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"spiece.{name}"))
