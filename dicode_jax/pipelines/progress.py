"""What a person sees of a call while it runs: bars, and how long the compiler has been at work."""

import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from dicode_jax.errors import UserError

Progress = Callable[[str, int, int], Any]
"""``(what, done, of how many)``"""


def silent(what: str, done: int, total: int) -> None:
    """Stands for nobody who listens, for whom a clip is one call."""


def heard(progress: Any) -> Progress | None:
    """What is to be told, or None where nobody listens: for None, False and `silent`.

    Raises:
      UserError: It is something else and no function, such as True: bars are of whole calls.
    """
    if progress is None or progress is False or progress is silent:
        return None
    if not callable(progress):
        raise UserError(
            "progress is a function of (what, done, total) here, or False; a bar is shown where a "
            "pipeline itself is called"
        )
    return progress


_TICK = 1.0  # seconds between two looks at the clock


@contextlib.contextmanager
def shown(progress: Any = True) -> Iterator[Progress]:
    """Gives a function to tell of the work, which is seen as bars of tqdm, also in a notebook.

    Where standard error is no terminal, such as a log, nothing is written.

    Args:
      progress: False shows nothing, which gives `silent`; a function is told instead, as
        `(what, done, total)`.
    """
    if callable(progress):
        yield progress
        return
    in_notebook = _in_notebook()
    if not progress or not (in_notebook or sys.stderr.isatty()):
        yield silent
        return
    bars = _Bars()
    with bars:
        yield bars


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


class _Bars:
    """One bar at a time; its text says when a program is being compiled, and for how long.

    Where steps are told, clips have no bar beside theirs: its text says which one it is.
    """

    def __init__(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tqdm, where there are no widgets
            from tqdm.auto import tqdm
        self._tqdm: Any = tqdm
        self._bar: Any = None
        self._what = self._text = ""
        self._clips = 0, 1, ""  # painted, of how many, and where they are written
        self._since: float | None = None  # when the compiler began
        self._over = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "_Bars":
        from jax import monitoring

        self("start", 0, 0)
        monitoring.register_event_duration_secs_listener(self._on_event)
        self._clock.start()
        return self

    def __exit__(self, *_: Any) -> None:
        from jax import monitoring

        monitoring.unregister_event_duration_listener(self._on_event)
        self._over.set()
        self._clock.join()
        self._bar.close()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        first, *place = what.split(" ", 1)  # as "clips in FILE"
        if first == "clips" and total is not None:
            self._clips = done, total, f" {place[0]}" if place else ""
        is_beside = first == "clips" and self._what == "steps"
        if what != self._what and not is_beside:
            if self._bar is not None:
                self._bar.close()
            self._what = what
            self._bar = self._tqdm(total=total or None, desc=what, dynamic_ncols=True, leave=False)
        self._text, (painted, clips, where) = self._what, self._clips
        if self._what == "steps" and clips > 1:
            self._text = f"clip {min(painted + 1, clips)} of {clips}{where}, steps"
        if not is_beside:
            self._bar.total = total or None
            self._bar.update(done - self._bar.n)
        self._bar.set_description(self._text, refresh=True)  # what is told is seconds apart

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """The last step before the compiler, and its end."""
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            self._since = time.monotonic()
        elif event == "/jax/core/compile/backend_compile_duration":
            self._since = None

    def _tick(self) -> None:
        while not self._over.wait(_TICK):
            since, text = self._since, self._text
            if since is not None:
                text = f"{text} (compiling, {time.monotonic() - since:.0f} s)"
            self._bar.set_description(text)
