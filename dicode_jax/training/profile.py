"""A trace of a few steps of a run, for TensorBoard's profile tab or Perfetto."""

import pathlib
from collections.abc import Callable

import jax

__all__ = ["Profile"]

SKIP, COUNT = 3, 5  # the first steps compile and fill caches


class Profile:
    """While entered, traces steps `first + 4` to `first + 8` into a folder.

    Args:
      folder: Where to; None traces nothing.
      first: Steps done before this run.
      notify: Is given one line when it is done, or came to nothing.
    """

    def __init__(
        self, folder: pathlib.Path | None, *, first: int, notify: Callable[[str], None] = print
    ):
        self._folder, self._notify = folder, notify
        self._start, self._stop = first + SKIP + 1, first + SKIP + COUNT + 1
        self._is_active = False

    def before(self, step: int, finish: Callable[[], None]) -> None:
        """To be called before each step; `finish` waits for the steps that are going on."""
        if self._folder is None or step not in (self._start, self._stop):
            return
        finish()
        if step == self._start:
            jax.profiler.start_trace(str(self._folder))
            self._is_active = True
        else:
            self._end()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._is_active:
            self._end()
        elif self._folder is not None and not self._folder.exists():
            self._notify(f"no trace: the run ended before step {self._start}")

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self._is_active = False
        self._notify(f"wrote a trace to {self._folder}: tensorboard --logdir shows it")
