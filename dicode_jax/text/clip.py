"""CLIP's byte-pair text tokenizer (OpenCLIP's `SimpleTokenizer`), from a file of its vocabulary.

The vocabulary is not part of this package. It is read from a Hugging Face `tokenizer.json` of any
CLIP with the same vocabulary, or from the `bpe_simple_vocab_16e6.txt.gz` that comes with OpenCLIP
(`installed_vocabulary` finds it). The empty prompt needs neither. Of what `ftfy` does to prompts in
the original, quotes, ligatures and full-width letters are put right, but text that was decoded
wrongly is not repaired; and the names of special tokens are read as the text that they are.
"""

import gzip
import html
import importlib.metadata
import io
import os
import pathlib
import unicodedata
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from dicode_jax.errors import UserError
from dicode_jax.storage.files import atomic_path, read_small
from dicode_jax.text import cut, guard

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_NUM_MERGES = 49152 - 256 - 2
_QUOTES = str.maketrans("\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "''''\"\"\"\"")
_WIDE = frozenset(map(chr, [*range(0xFB00, 0xFB07), *range(0xFF01, 0xFF5F), 0x3000]))
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Prompts to the ids of CLIP's text tower: start, words, end, then zeros.

    Args:
      tokenizer: Knows the words; None for a tokenizer of the empty prompt alone.
      vocab_size: Entries of the text tower's table; start and end are the last two.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer | None, vocab_size: int):
        """Raises UserError when the tokenizer's vocabulary is another one; see `guard.check`."""
        self._tokenizer = tokenizer
        self.start_id, self.end_id = vocab_size - 2, vocab_size - 1
        if tokenizer is None:
            return
        got = (tokenizer.token_to_id(START), tokenizer.token_to_id(END))
        if got != (self.start_id, self.end_id):
            raise UserError(
                f"not the vocabulary of this text tower: {START} and {END} have the ids {got}, "
                f"want {self.start_id, self.end_id}"
            )
        guard.check(tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True

    @classmethod
    def from_file(cls, path: str | os.PathLike, vocab_size: int) -> "ClipTokenizer":
        """Reads `tokenizer.json` (or a folder that holds it) or OpenCLIP's `.txt.gz` of merges.

        Raises:
          UserError: There is no such file, it cannot be read, or it holds another vocabulary.
        """
        path = pathlib.Path(path)
        file = path / TOKENIZER_FILE if os.path.isdir(path) else path
        if not os.path.isfile(file):
            raise UserError(f"no CLIP vocabulary at {path}: want {TOKENIZER_FILE} or a .txt.gz")
        with guard.refusing(f"{file} does not hold a CLIP vocabulary"):
            if file.suffix == ".gz":
                with gzip.open(io.BytesIO(read_small(file, guard.MAX_FILE))) as unpacked:
                    text = unpacked.read(guard.MAX_FILE + 1)
                if len(text) > guard.MAX_FILE:
                    raise ValueError(f"it unpacks to more than {guard.MAX_FILE} bytes")
                lines = text.decode().split("\n")
                tokenizer = build(lines[1 : 1 + _NUM_MERGES])  # the first line is a version
            else:
                tokenizer = guard.read_tokenizer(file)
            return cls(tokenizer, vocab_size)

    @property
    def has_words(self) -> bool:
        """Whether more than the empty prompt can be spelled."""
        return self._tokenizer is not None

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json` into a folder; nothing for a tokenizer of the empty prompt."""
        if self._tokenizer is not None:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            with atomic_path(pathlib.Path(folder) / TOKENIZER_FILE) as temporary:
                self._tokenizer.save(str(temporary))

    def __call__(self, prompts: Sequence[str], length: int) -> np.ndarray:
        """Ids int32 [b, length]. A prompt that is too long is cut, with a warning, before its end.

        Raises:
          UserError: A prompt is not empty and there is no vocabulary.
        """
        ids = np.zeros((len(prompts), length), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            words = self._words(_clean(prompt), length - 2)
            row[: len(words) + 2] = [self.start_id, *words, self.end_id]
        return ids

    def _words(self, prompt: str, length: int) -> list[int]:
        if not prompt:
            return []
        if self._tokenizer is None:
            raise UserError(
                "this model was converted without CLIP's vocabulary and knows the empty prompt "
                'only; pass "", or convert again with --vocab FILE or open_clip_torch installed'
            )
        guard.check_length(prompt)
        with guard.refusing("the tokenizer fails at the prompt"):
            encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
        if words := cut.left_out(prompt, encoding.offsets, length):
            cut.warn(words, len(encoding.ids), length, stacklevel=4)
        return encoding.ids[:length]


def installed_vocabulary(vocab_size: int) -> pathlib.Path | None:
    """The file of merges that `open_clip_torch` brings, which is not imported.

    None where it is not installed, or the text tower's table is of another size.
    """
    try:
        files = importlib.metadata.files("open_clip_torch") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (pathlib.Path(str(file.locate())) for file in files if file.name == VOCABULARY)
    fits = vocab_size == 2 * 256 + _NUM_MERGES + 2
    return next((path for path in found if fits and path.is_file()), None)


def build(merges: Sequence[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a list of merges, `"a b</w>"` each, in order of rank."""
    pairs = [(first, second) for first, second in map(str.split, merges)]
    letters = _bytes_in_order()
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in pairs)]
    tokens += [START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab, pairs, unk_token=END, end_of_word_suffix="</w>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def _bytes_in_order() -> list[str]:
    """A printable character for every byte, in the order of CLIP's ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def _clean(prompt: str) -> str:
    """What the original does to a prompt first; see the module's text for the difference."""
    plain = "".join(unicodedata.normalize("NFKC", c) if c in _WIDE else c for c in prompt)
    plain = html.unescape(html.unescape(plain.translate(_QUOTES)))
    return " ".join(plain.split()).lower()
