"""What of a prompt lies behind the last token that a model reads, and the warning that says so."""

import warnings
from collections.abc import Sequence

from dicode_jax.errors import printable

__all__ = ["left_out", "warn"]


def left_out(text: str, offsets: Sequence[tuple[int, int]], length: int) -> str:
    """The words of `text` that its first `length` tokens do not spell to the end; "" for none.

    Args:
      text: As the tokenizer got it.
      offsets: Where each of all its tokens begins and ends in it.
      length: How many of them are read.
    """
    if len(offsets) <= length:
        return ""
    start = offsets[length][0]
    if text[start : start + 1].isspace():  # some tokens begin with the space before the word
        return text[start:].strip()
    while start and not text[start - 1].isspace():  # a word that is cut in its middle
        start -= 1
    return text[start:].strip()


def warn(words: str, num_tokens: int, length: int, *, stacklevel: int) -> None:
    """Says which words are not read; a long rest is shortened."""
    shown = printable(words if len(words) <= 200 else f"{words[:200]}...")
    warnings.warn(
        f"the prompt has {num_tokens} tokens; the model reads the first {length} and leaves out: "
        f"{shown}",
        stacklevel=stacklevel + 1,
    )
