"""Errors that are meant for people.

Anything a user can cause (a wrong file, an impossible option) is raised as `UserError`: one line
that says what was wrong and what to do. The command line prints it and exits with status 2;
everything else is a bug and keeps its traceback.
"""

from typing import Any

__all__ = ["OptionGone", "UserError"]


class UserError(ValueError):
    """A mistake that the user can mend; the message is one line, ready to be shown."""


class OptionGone(ValueError):
    """A configuration sets an option that earlier releases had."""

    def __init__(self, option: str, value: Any, instead: str):
        self.option = f"{option} = {value!r}"
        super().__init__(f"{self.option} is gone: {instead} has replaced it")
