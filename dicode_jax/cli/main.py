"""The `dicode` command and its manners.

Everything that can be checked before the model loads is checked first; jax is imported only by
commands that compute. A mistake in what is asked gets one line on stderr and exit status 2, Ctrl-C
gets 130, and neither leaves a half-written file: of a video the clips that were painted stay, under
a name of their own (see `media.writer`).
"""

import contextlib
import gc
import os
import pathlib
import sys
import warnings
from collections.abc import Iterator, Sequence

from dicode_jax.cli import app, completion, data, doctor, evaluate, info, many, runs, video, warmup
from dicode_jax.cli.arguments import make_parser
from dicode_jax.errors import UserError, print_any_name
from dicode_jax.runtime.interrupts import exit_status, polite_signals

EXIT_ERROR = 2

COMMANDS = {
    "generate": many.generate,
    "continue": many.continue_,
    "interpolate": many.interpolate,
    "reconstruct": video.reconstruct,
    "encode": video.encode,
    "decode": video.decode,
    "evaluate": evaluate.evaluate,
    "info": info.info,
    "data": data.data,
    "metrics": runs.metrics,
    "export": runs.export,
    "warmup": warmup.warmup,
    "doctor": doctor.doctor,
    "app": app.app,
    "completion": lambda args: completion.completion(args, make_parser(COMMANDS)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    print_any_name()
    try:
        with polite_signals(), _one_line_warnings(), _rare_collections():
            args = make_parser(COMMANDS).parse_args(argv)
            with contextlib.ExitStack() as args.stack:  # what a command leaves when it is over
                args.run(args)
            sys.stdout.flush()
        return 0
    except SystemExit as exit_:  # argparse: after --help, or a mistake that it has reported
        return int(exit_.code or 0)
    except UserError as error:
        return _fail(str(error), error)
    except KeyboardInterrupt as interrupt:
        _fail("stopped", interrupt)
        return exit_status(interrupt)
    except BrokenPipeError:  # the reader of our output is gone, as with `dicode info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except MemoryError as error:
        return _fail("not enough memory; ask for fewer or smaller clips", error)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return _fail("not enough device memory; ask for fewer or smaller clips", error)
        raise


def _fail(message: str, error: BaseException) -> int:
    """One line of what went wrong, and of what is left of the work."""
    message = "; ".join([message, *getattr(error, "__notes__", ())])
    print("dicode: error: " + " ".join(message.split()), file=sys.stderr)
    return EXIT_ERROR


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Shows our own warnings in one line each; those of other packages are not for the user."""

    def show(message, category, filename, lineno, file=None, line=None):
        ours = pathlib.Path(__file__).parents[1] in pathlib.Path(filename).parents
        if ours and issubclass(category, UserWarning):
            print("dicode: warning: " + " ".join(str(message).split()), file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Looks for cycles seldom: tracing makes millions of objects, of which few are garbage.

    A second start of `dicode generate` spends 0.4 s of its 7 there, at Python's thresholds 0.9.
    """
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)
