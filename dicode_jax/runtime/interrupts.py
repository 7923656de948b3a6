"""Stopping a command from outside: a scheduler's SIGTERM, a terminal that closes, Ctrl-C."""

import contextlib
import signal
import time
from collections.abc import Iterator

__all__ = ["exit_status", "polite_signals"]

_PATIENCE = 10.0  # seconds for removing what is unfinished


@contextlib.contextmanager
def polite_signals() -> Iterator[None]:
    """While entered, SIGTERM and SIGHUP unwind like Ctrl-C, so that unfinished files are removed.

    Schedulers repeat themselves, and people press Ctrl-C twice: what follows the first signal
    within ten seconds does not stop the removing. A signal that is ignored stays so, as `nohup`
    wants.
    """
    before = {}
    patient_until = 0.0

    def stop(number, frame):
        nonlocal patient_until
        if time.monotonic() >= patient_until:
            patient_until = time.monotonic() + _PATIENCE
            raise KeyboardInterrupt(signal.Signals(number))

    try:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
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
