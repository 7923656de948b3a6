"""Stopping a command from outside: a scheduler's SIGTERM, a terminal that closes, Ctrl-C."""

import contextlib
import signal
from collections.abc import Iterator

__all__ = ["exit_status", "polite_signals"]


@contextlib.contextmanager
def polite_signals() -> Iterator[None]:
    """While entered, SIGTERM and SIGHUP unwind like Ctrl-C, so that unfinished files are removed.

    Only the first one does: schedulers repeat them, and the repetition must not stop the removing.
    A signal that is ignored stays so, as `nohup` wants.
    """
    before = {}

    def stop(number, frame):
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number))

    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """What a shell expects after a signal: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
