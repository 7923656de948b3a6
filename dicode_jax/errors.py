"""Errors that are meant for people.

Anything a user can cause (a wrong file, an impossible option) is raised as `UserError`: one line
that says what was wrong and what to do. The command line prints it and exits with status 2;
everything else is a bug and keeps its traceback.
"""

import contextlib
import io
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Faults", "OptionGone", "UserError", "print_any_name", "printable"]

_LONGEST = 2000  # characters of a message


def printable(text: object, limit: int | None = None) -> str:
    r"""Text of foreign files, such as a name, a key or a caption, as one line for people.

    A terminal obeys control characters and a log takes what follows a line break for a line of its
    own. Here line breaks are spaces, and what a terminal would obey or hide (controls, marks that
    turn the direction of writing, halves of characters) is written as Python does, like `\x1b`.

    Args:
      limit: Longer text loses characters in its middle, and says how many.
    """
    line = " ".join(str(text).splitlines())
    line = "".join(map(_shown, line)) if not line.isprintable() else line
    if limit is None or len(line) <= limit:
        return line
    head, tail = limit - limit // 4, limit // 4
    return f"{line[:head]} [... {len(line) - limit} characters ...] {line[-tail:] if tail else ''}"


def _shown(sign: str) -> str:
    if sign.isprintable() or sign in "\u200c\u200d":  # the two that join and part letters
        return sign
    if unicodedata.category(sign) == "Zs" or sign == "\t":
        return " "
    return sign.encode("unicode_escape").decode()


def print_any_name() -> None:
    """Lets standard output take names that are no text, with backslashes as on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class UserError(ValueError):
    """A mistake that the user can mend; the message is one line, ready to be shown.

    Each argument is a line of its own; only `Faults` gives several.
    """

    def __init__(self, *lines: object):
        super().__init__(*(printable(line, _LONGEST) for line in lines))

    def __str__(self) -> str:
        return "\n  ".join(self.args)


class OptionGone(ValueError):
    """A configuration sets an option that earlier releases had."""

    def __init__(self, option: str, value: Any, instead: str):
        self.option = f"{option} = {value!r}"
        super().__init__(f"{self.option} is gone: {instead} has replaced it")


class Faults:
    """Gathers mistakes that do not depend on each other, to tell them all at once."""

    def __init__(self):
        self.lines: list[str] = []

    @contextlib.contextmanager
    def gather(self) -> Iterator[None]:
        """Keeps the mistake that ends the block."""
        try:
            yield
        except ValueError as error:  # also of a config that refuses a value
            self.lines += [line for line in [str(error)] if line not in self.lines]

    def through(self, value: Any, *steps: Callable[[Any], Any]) -> Any:
        """A value after steps, of which those that make a mistake leave it as it is.

        Raises:
          UserError: There were mistakes, here or before; these come last.
        """
        before, self.lines = self.lines, []
        for step in steps:
            with self.gather():
                value = step(value)
        self.lines += before
        self.tell()
        return value

    def tell(self) -> None:
        """Ends the gathering.

        Raises:
          UserError: There were mistakes; of several each has a line.
        """
        if len(self.lines) == 1:
            raise UserError(self.lines[0])
        if self.lines:
            lines = [f"{i}. {line}" for i, line in enumerate(self.lines, 1)]
            raise UserError(f"{len(lines)} things to mend:", *lines)
