"""How much one visitor of the page may ask for. The server checks it, whatever the page shows."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from dicode_jax.errors import UserError, printable
from dicode_jax.pipelines import options

__all__ = ["Limits", "at_most", "check_prompt", "has_room", "own_file", "whole"]

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused beyond these.

    Attributes:
      prompt: Characters of a prompt.
      clips: Of a video.
      frames: Of a video that is given, at the rate of the model, and of one that is painted frame
        by frame.
      decoded: Frames that are read of a file that is given.
      file_bytes: Of a file that is given.
      stored_bytes: Of the server's folder, which uploads and videos lie in for a day; beyond these
        no file is taken.
      waiting: Prompts in the queue, of all visitors.
      kept: Videos of a visitor; beyond these the oldest one goes.
    """

    prompt: int = 500
    clips: int = 10
    frames: int = options.MAX_FRAMES
    decoded: int = 20_000
    file_bytes: int = 50 * 2**20
    stored_bytes: int = 4 * 2**30
    waiting: int = 16
    kept: int = 20


def check_prompt(prompt: Any, limits: Limits) -> str:
    """The prompt on one line.

    Raises:
      UserError: It is no text, or too long.
    """
    if not isinstance(prompt, str):
        raise UserError(f"a prompt is text, got {options.shown(prompt)}")
    if len(prompt) > limits.prompt:
        raise UserError(
            f"the prompt has {len(prompt)} characters; at most {limits.prompt} are read"
        )
    return printable(prompt).strip()


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number of `low..high`; sliders of a page may give it as 3.0.

    Raises:
      UserError: It is none.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return options.named(name, options.Whole(low, high), value)


def own_file(path: Any, folder: str | os.PathLike, limits: Limits) -> pathlib.Path:
    """The file of a name that came from outside, if it lies in the folder of uploads.

    Links are followed first, so that one that leads out of the folder is refused too.

    Raises:
      UserError: It lies elsewhere, is no file, or is too large. The line holds no path.
    """
    try:
        real = pathlib.Path(path).resolve(strict=True)
        is_own = real.is_relative_to(pathlib.Path(folder).resolve()) and real.is_file()
        size = real.stat().st_size
    except (OSError, ValueError, TypeError, RuntimeError):
        is_own, size = False, 0
    if not is_own:
        raise UserError("this is no file that was uploaded here; upload it again")
    if size > limits.file_bytes:
        raise UserError(
            f"{printable(real.name, 60)} has {size / 2**20:.1f} MB; at most "
            f"{limits.file_bytes / 2**20:g} MB are read"
        )
    return real


def has_room(folder: str | os.PathLike, limits: Limits) -> bool:
    """Whether a file of the largest size still fits what the server's folder may hold, in bytes."""
    held = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # gone by now
                held += os.stat(os.path.join(parent, name), follow_symlinks=False).st_size
    return held + limits.file_bytes <= limits.stored_bytes


def at_most(count: int, items: Iterable[_T], what: str) -> Iterator[_T]:
    """The items.

    Raises:
      UserError: There are more of them, at the first one beyond.
    """
    for index, item in enumerate(items):
        if index == count:
            raise UserError(f"{what} has more than {count} frames; cut it to its last seconds")
        yield item
