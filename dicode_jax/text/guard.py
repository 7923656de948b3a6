"""Tokenizers of files from elsewhere: read within bounds, and run where they may fail."""

import base64
import contextlib
import os
import stat
from collections.abc import Iterator
from typing import Any

import tokenizers

from dicode_jax.errors import UserError, printable
from dicode_jax.storage.files import parse_json, read_small

__all__ = ["MAX_FILE", "check", "check_length", "check_size", "read_tokenizer", "refusing"]

MAX_FILE = 1 << 25  # bytes; Llama 3's tokenizer.json has 9 to 17 million
MAX_PROMPT = 20_000  # letters; a bad pattern takes 3 s for as many, and 100 s for 100,000
MAX_GROWTH = 16  # letters that rules of replacement make of one
NFKC_LONGEST = 18  # letters that Unicode's own table makes of one, which is no rule of a stranger's


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Makes one line of whatever the library raises inside, where panics are no `Exception`.

    Args:
      what: Begins the line.

    Raises:
      UserError: Something was raised; an interruption is none.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {printable(error, 200)}") from error


def read_tokenizer(path: str | os.PathLike) -> tokenizers.Tokenizer:
    """The tokenizer in a `tokenizer.json`; whoever takes it calls `check`.

    Raises:
      UserError: It is no file, too large, or holds none.
    """
    return tokenizers.Tokenizer.from_buffer(read_small(path, MAX_FILE))


def check(tokenizer: tokenizers.Tokenizer) -> None:
    """Makes sure that a tokenizer gives ids of its vocabulary, and of a text not a far longer one.

    Raises:
      UserError: It does not.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if set(ids) != set(range(len(ids))):
        raise UserError(f"the ids of a vocabulary of {len(ids)} are not those from 0 on, once each")
    for part in (tokenizer.normalizer, tokenizer.decoder):
        growth = 1 if part is None else _growth(parse_json(part.__getstate__(), "a rule"))
        if growth > MAX_GROWTH:
            raise UserError(
                f"its rules of replacement make up to {printable(growth, 20)} letters of one, at "
                f"most {MAX_GROWTH} are taken"
            )


def check_length(prompt: str) -> None:
    """Refuses a prompt that would take very long.

    Raises:
      UserError: It has more than `MAX_PROMPT` letters.
    """
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"the prompt has {len(prompt)} letters, at most {MAX_PROMPT} are read")


def check_size(path: str | os.PathLike) -> None:
    """Refuses a file that the library would read whole, whatever it is.

    Raises:
      UserError: It is no file, or larger than `MAX_FILE`.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE:
        raise UserError(f"{path} is no file of at most {MAX_FILE} bytes")


def _growth(rules: Any) -> int:
    """Letters that come of one where every rule finds it anew, at most."""
    growth, todo = 1, [rules]
    while todo:
        held = todo.pop()
        if isinstance(held, dict):
            todo += held.values()
            if held.get("type") in ("Replace", "Prepend"):
                growth *= 1 + len(held.get("content") or held.get("prepend") or "")
            if held.get("type") == "Precompiled":
                growth *= _longest(held.get("precompiled_charsmap") or "")
        elif isinstance(held, list):
            todo += held
    return growth


def _longest(charsmap: str) -> int:
    """Letters of the longest string that sentencepiece's table of replacements puts in, at least 1.

    It holds the size of a trie, the trie, and the strings, a zero behind each. What is not longer
    than `NFKC_LONGEST` counts as 1.
    """
    table = base64.b64decode(charsmap)
    strings = table[4 + int.from_bytes(table[:4], "little") :].decode().split("\0")
    longest = max(map(len, strings))
    return longest if longest > NFKC_LONGEST else 1
