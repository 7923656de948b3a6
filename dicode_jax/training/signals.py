"""Stopping a run from outside: SIGTERM of a scheduler, Ctrl-C, a terminal that closes (SIGHUP)."""

import os
import signal
import stat
import threading
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["StopSignals"]


class StopSignals:
    """While entered, SIGTERM, SIGHUP and Ctrl-C ask to stop after the step that is going on.

    A SIGHUP that is ignored stays so, as `nohup` wants. Schedulers repeat SIGTERM; the repetition
    changes nothing. A second Ctrl-C is raised as `KeyboardInterrupt`, for a person who does not
    want to wait.

    With several processes these must stop after the same step, whichever of them was told: that is
    what JAX's coordination service is for, which watches SIGTERM itself. The others are passed on.

    Args:
      notify: Is given one line about the first signal.
    """

    def __init__(self, notify: Callable[[str], None] = lambda line: None):
        self._notify = notify
        self._received: signal.Signals | None = None
        self._earlier: dict[signal.Signals, Any] = {}
        self._is_distributed = jax.process_count() > 1

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python handles signals in the main thread only
        wanted = [signal.SIGINT] if self._is_distributed else [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            wanted.append(signal.SIGHUP)
        self._earlier = {number: signal.signal(number, self._receive) for number in wanted}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def stop_after(self, step: int) -> signal.Signals | None:
        """The signal for which the run must end after this step, None to go on.

        With several processes every one of them must ask after every step.
        """
        if not self._is_distributed:
            return self._received
        from jax.experimental import multihost_utils

        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        if self._received is None:
            self._notify(f"SIGTERM of some process: saving step {step} on all, then stopping")
        return self._received or signal.SIGTERM

    def _receive(self, number: int, _frame) -> None:
        is_first, number = self._received is None, signal.Signals(number)
        if number == signal.SIGHUP:
            _leave_terminal()
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number if is_first or number == signal.SIGINT else self._received
        if is_first:
            self._notify(f"{number.name}: saving after this step, then stopping")
        if self._is_distributed:
            os.kill(os.getpid(), signal.SIGTERM)


def _leave_terminal() -> None:
    """What is still said to a terminal that is gone would be an error, and end the run."""
    for number in (1, 2):
        if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
