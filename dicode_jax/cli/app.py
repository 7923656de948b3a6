"""`dicode app`: the page on which prompts are typed and clips are watched."""

import argparse
import importlib.metadata
import re
import threading
import warnings
from collections.abc import Callable

from dicode_jax.errors import UserError
from dicode_jax.pipelines.options import MAX_CLIPS, Whole, number

_INSTALL = 'pip install "dicode-jax[app]"'
_NEEDED = (6, 31)  # of Gradio
_LOCAL = {"127.0.0.1", "localhost", "::1"}


def add_parsers(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `app` to the parser of `dicode`."""
    sub = command(
        "app",
        "serve a web page to paint videos on",
        f"It needs Gradio: {_INSTALL}. Ctrl-C ends it, and what was painted on it is gone then.",
    )
    sub.add_argument(
        "--model",
        metavar="PATH",
        action="append",
        help="a model folder, a packaged name or owner/name on the Hub; may be repeated, and the "
        "page has a picker of these and of the packaged ones (default: the packaged ones)",
    )
    sub.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen; 0.0.0.0 for all that reach this machine (default: 127.0.0.1, this "
        "machine alone)",
    )
    sub.add_argument(
        "--port",
        type=number(int, Whole(1, 65535)),
        default=7860,
        metavar="N",
        help="default: 7860",
    )
    sub.add_argument(
        "--auth", metavar="USER:PASS", help="name and password that visitors must type"
    )
    sub.add_argument(
        "--max-clips",
        type=number(int, Whole(1, MAX_CLIPS)),
        default=10,
        metavar="N",
        help="most clips of a video (default: 10)",
    )


def app(args: argparse.Namespace) -> None:
    """Serves the page until a signal comes.

    Raises:
      UserError: Gradio is missing or too old, an argument is impossible, a model is broken, or the
        address is taken.
    """
    auth = _auth(args.auth)
    if _gradio_version() < _NEEDED:
        wanted = ".".join(map(str, _NEEDED))
        raise UserError(f"dicode app needs Gradio {wanted} or newer; install it: {_INSTALL}")
    from dicode_jax.app import page
    from dicode_jax.app.limits import Limits
    from dicode_jax.app.models import installed

    if args.host not in _LOCAL and auth is None:
        warnings.warn(
            f"whoever reaches {args.host} can use this machine; --auth USER:PASS asks visitors "
            "for a password",
            stacklevel=2,
        )
    models, limits = installed(*(args.model or ())), Limits(clips=args.max_clips)
    with page.serving(models, host=args.host, port=args.port, auth=auth, limits=limits) as address:
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        threading.Event().wait()


def _auth(given: str | None) -> tuple[str, str] | None:
    """Name and password.

    Raises:
      UserError: One of them is missing.
    """
    if given is None:
        return None
    user, _, password = given.partition(":")
    if not user or not password:
        raise UserError("argument --auth: want USER:PASS, a name, a colon and a password")
    return user, password


def _gradio_version() -> tuple[int, ...]:
    """The first two numbers; (0, 0) where it is not installed."""
    try:
        found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("gradio"))
    except importlib.metadata.PackageNotFoundError:
        found = None
    return (0, 0) if found is None else (int(found[1]), int(found[2]))
