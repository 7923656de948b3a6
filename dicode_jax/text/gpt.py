"""Prompts to token ids, in the special-token layout that DiCoDe puts on top of GPT-2's vocabulary.

The last id of the base vocabulary is ``<|endoftext|>``, which also pads; 66 special tokens follow
it: ``</img>``, ``<img>``, and ``<img_00000>`` to ``<img_00063>`` (GPT-2: 50257, 50258,
50259...50322). Prompts are stripped, cut and padded on the right, and get no token of their own in
front. Llama 3 pads with its ``<|end_of_text|>`` (128001), and the 66 follow its last id (128255).

GPT-2's and Llama 3's vocabularies are read from a folder; `learn` makes one of any captions, and
`train_small` that of `dicode_jax.data.shapes_world`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from dicode_jax.errors import UserError
from dicode_jax.storage.files import atomic_path, read_object
from dicode_jax.text import cut, guard

END_OF_TEXT = "<|endoftext|>"
LLAMA_END_OF_TEXT = "<|end_of_text|>"
IMAGE_END = "</img>"
IMAGE_START = "<img>"
NUM_QUERY_TOKENS = 64
IMAGE_TOKENS = (IMAGE_END, IMAGE_START, *(f"<img_{i:05d}>" for i in range(NUM_QUERY_TOKENS)))

TOKENIZER_FILE = "tokenizer.json"
DEFAULT_LENGTH = 80

# Marks the start of a word in the small vocabulary, as sentencepiece does.
_WORD_START = "▁"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedText:
    """Prompts as ids.

    Attributes:
      ids: right-padded with the end-of-text token.
      lengths: tokens of each prompt before cutting; above `ids.shape[1]` the prompt was cut.
      left_out: the words of each prompt that the cut took, "" for none.
    """

    ids: Int[np.ndarray, "b t"]
    lengths: tuple[int, ...]
    left_out: tuple[str, ...]

    @property
    def truncated(self) -> tuple[int, ...]:
        """The places of the prompts that were too long and were cut."""
        return tuple(i for i, n in enumerate(self.lengths) if n > self.ids.shape[1])


class TextTokenizer:
    """A BPE vocabulary with the image tokens added; see the module's text for the layout.

    Attributes:
      pad_id: id of the end-of-text token; of GPT-2's kind it is the last of the base vocabulary.
      image_start_id: id of `<img>`, which stands before the deep tokens of every keyframe.
      vocab_size: base vocabulary plus the 66 image tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """Takes over `tokenizer`, and adds the special tokens that it does not hold yet.

        Raises:
          UserError: it has no end-of-text token, other tokens stand where the image tokens go, or
            it cannot be trusted (see `guard.check`).
        """
        own_id = tokenizer.token_to_id(END_OF_TEXT)
        pad_id = tokenizer.token_to_id(LLAMA_END_OF_TEXT) if own_id is None else own_id
        if pad_id is None:
            raise UserError(
                f"the tokenizer has no {END_OF_TEXT} token; it is neither GPT-2's nor Llama 3's"
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.add_special_tokens(list(IMAGE_TOKENS))
        ids = [tokenizer.token_to_id(token) for token in IMAGE_TOKENS]
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        last = size - len(IMAGE_TOKENS) - 1  # other tokens may follow the end of text
        if ids != list(range(last + 1, last + 1 + len(IMAGE_TOKENS))):
            raise UserError(
                f"the image tokens must follow the last of the base vocabulary (id {last}) in "
                f"order, but {IMAGE_END} has id {ids[0]} and {IMAGE_TOKENS[-1]} id {ids[-1]}"
            )
        guard.check(tokenizer)
        self._tokenizer = tokenizer
        self.pad_id: int = pad_id
        self.image_start_id: int = last + 2
        self.vocab_size: int = size
        self._alphabet = _closed_alphabet(tokenizer)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "TextTokenizer":
        """Reads a `tokenizer.json`, or a folder that holds one or GPT-2's two files.

        Those are `vocab.json` and `merges.txt`, and `added_tokens.json` if there are more.

        Raises:
          UserError: nothing of that kind is there, or it cannot be read.
        """
        path = pathlib.Path(path)
        file = path / TOKENIZER_FILE if os.path.isdir(path) else path
        vocab, merges = path / "vocab.json", path / "merges.txt"
        with guard.refusing(f"{path} does not hold a readable tokenizer"):
            if os.path.isfile(file):
                return cls(guard.read_tokenizer(file))
            if vocab.is_file() and merges.is_file():
                return cls(_gpt2(vocab, merges, path / "added_tokens.json"))
        raise UserError(
            f"no tokenizer in {path}: want {TOKENIZER_FILE}, or vocab.json and merges.txt"
        )

    def to_json(self) -> str:
        """All that decides on ids, as `save` writes it."""
        return self._tokenizer.to_str()

    def save(self, path: str | os.PathLike) -> None:
        """Writes `tokenizer.json` into the folder `path`, or the file `path` if it is a .json."""
        path = pathlib.Path(path)
        file = path if path.suffix == ".json" else path / TOKENIZER_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            self._tokenizer.save(str(temporary))

    def encode(
        self,
        prompts: str | Sequence[str],
        length: int = DEFAULT_LENGTH,
        *,
        allow_empty: bool = True,
    ) -> EncodedText:
        """Turns prompts into ids int32 [b, length], stripped, cut and padded on the right.

        The empty prompt is all padding; it is what guidance runs against. Words in angle brackets
        are read as special tokens, as GPT-2's tokenizer does.

        Raises:
          UserError: a prompt holds characters that the vocabulary cannot spell (they are named), is
            very long, or empty and `allow_empty` is off; or the tokenizer fails.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if length < 1:
            raise UserError(f"the text length must be positive, got {length}")
        prompts = [prompt.strip() for prompt in prompts]
        for prompt in prompts:
            guard.check_length(prompt)
            if not _is_unicode(prompt):
                raise UserError("the prompt is not valid text: it holds bytes that are not UTF-8")
            if not prompt and not allow_empty:
                raise UserError("the prompt is empty; say what to show")
            self._check_alphabet(prompt)
        # Llama's tokenizer would put a token in front of every prompt, the empty one too.
        with guard.refusing("the tokenizer fails at the prompt"):
            encodings = self._tokenizer.encode_batch(prompts, add_special_tokens=False)
        rows = [encoding.ids for encoding in encodings]
        ids = np.full((len(rows), length), self.pad_id, np.int32)
        for row, tokens in zip(ids, rows, strict=True):
            tokens = tokens[:length]
            row[: len(tokens)] = tokens
        left_out = tuple(
            cut.left_out(prompt, encoding.offsets, length)
            for prompt, encoding in zip(prompts, encodings, strict=True)
        )
        return EncodedText(ids=ids, lengths=tuple(map(len, rows)), left_out=left_out)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of one row of ids, without special tokens and padding."""
        with guard.refusing("the tokenizer fails at its own ids"):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def _check_alphabet(self, prompt: str) -> None:
        if self._alphabet is None:
            return
        text = prompt
        for token in (END_OF_TEXT, *IMAGE_TOKENS):
            text = text.replace(token, " ")
        if self._tokenizer.normalizer is not None:
            with guard.refusing("the tokenizer fails at the prompt"):
                text = self._tokenizer.normalizer.normalize_str(text)
        unknown = sorted(set(text) - self._alphabet)
        if unknown:
            names = " ".join(repr(character) for character in unknown)
            raise UserError(
                f"the prompt holds characters that the model has never seen: {names}; "
                f"it knows {_ranges(self._alphabet)} and the space"
            )


def train_small(captions: Iterable[str], *, vocab_size: int = 256) -> TextTokenizer:
    """Makes the small vocabulary; the same captions give the same one, to the byte.

    Text is put in lower case, runs of white space count as one space, and `an` as `a`. The letters
    a to z all belong to the vocabulary, so that any lower-case word can be spelled; what the
    captions do not hold beyond that cannot.

    Args:
      captions: what to learn from, such as `data.shapes_world.all_captions()`.
      vocab_size: an upper bound of the base vocabulary; the default leaves every word of the
        synthetic world whole (144 entries).
    """
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    learned = tokenizers.Tokenizer(models.BPE())
    learned.normalizer = _small_normalizer()
    learned.pre_tokenizer = pre_tokenizers.Metaspace(_WORD_START, prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=[*letters, _WORD_START],
        show_progress=False,
    )
    learned.train_from_iterator(sorted(captions), trainer)
    tokenizer = tokenizers.Tokenizer.from_str(learned.to_str())
    tokenizer.decoder = decoders.Metaspace(_WORD_START, prepend_scheme="always")
    tokenizer.add_special_tokens([END_OF_TEXT])  # last, as in GPT-2
    return TextTokenizer(tokenizer)


def learn(captions: Iterable[str], *, vocab_size: int) -> TextTokenizer:
    """Learns a vocabulary of bytes, as GPT-2's is; the same captions give the same, to the byte.

    All 256 bytes belong to it, so that any text can be spelled and comes back as it was.

    Args:
      captions: What to learn from, in any order; of none it is the bytes alone.
      vocab_size: An upper bound of the base vocabulary, at least 257.
    """
    learned = tokenizers.Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
    )
    learned.train_from_iterator(sorted(map(str.strip, captions)), trainer)
    learned.add_special_tokens([END_OF_TEXT])  # last, as in GPT-2
    return TextTokenizer(learned)


def _small_normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Strip(),
            # `an orange` as the models read it that learned from `a orange`.
            normalizers.Replace(tokenizers.Regex(r"\ban (?=[aeiou])"), "a "),
        ]
    )


def _gpt2(vocab: pathlib.Path, merges: pathlib.Path, added: pathlib.Path) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE from its two files, and a third of tokens that were added."""
    for file in (vocab, merges):
        guard.check_size(file)
    tokenizer = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])  # keeps its id, and is now read as one token
    extra = read_object(added, "a list of tokens") if added.is_file() else {}
    for token in sorted(extra, key=extra.__getitem__):
        tokenizer.add_special_tokens([token])
        if (got := tokenizer.token_to_id(token)) != extra[token]:
            raise UserError(f"{added} gives {token!r} the id {extra[token]}; the next is {got}")
    return tokenizer


def _closed_alphabet(tokenizer: tokenizers.Tokenizer) -> frozenset[str] | None:
    """The characters that can be spelled, or None when every byte can (GPT-2)."""
    if not isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Metaspace):
        return None
    single = {token for token in tokenizer.get_vocab(with_added_tokens=False) if len(token) == 1}
    return frozenset(single - {_WORD_START} | {" "})


def _is_unicode(text: str) -> bool:
    """Whether text has no lone surrogates, which stand for bytes that could not be decoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _ranges(alphabet: Iterable[str]) -> str:
    """Characters in words: 'a-z'."""
    characters, runs = sorted(set(alphabet) - {" "}), []
    for character in characters:
        if runs and ord(character) == ord(runs[-1][-1]) + 1:
            runs[-1] = runs[-1][0] + character
        else:
            runs.append(character)
    return " ".join(run if len(run) == 1 else f"{run[0]}-{run[1]}" for run in runs)
