"""Output files that are checked before the work and appear only when they are whole."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator, Sequence

from dicode_jax.errors import UserError


def check_output(path: str | os.PathLike, suffixes: Sequence[str]) -> pathlib.Path:
    """Makes sure that `path` can be written, without leaving a trace of the trial.

    Raises:
      UserError: the extension is not one of `suffixes`, the folder is missing or cannot be written,
        or `path` is a folder.
    """
    path = pathlib.Path(path)
    known = ", ".join(suffixes)
    if path.suffix.lower() not in suffixes:
        found = f"the extension {path.suffix!r}" if path.suffix else "no extension"
        raise UserError(f"{path} has {found}; write to one of: {known}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"the output folder {path.parent} does not exist; make it first")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{path} exists and is write-protected")
    trial = _temporary(path)
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write into the folder {path.parent}: {error.strerror or error}"
        ) from error
    return path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a name to write to, beside `path`, which takes the place of `path` at the end.

    When the block fails or is interrupted, the unfinished file is removed and whatever was at
    `path` stays as it was. The file gets the usual permissions (safetensors would keep it private).
    """
    path = pathlib.Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: pathlib.Path) -> pathlib.Path:
    """A fresh hidden name in the same folder with the same extension."""
    return path.with_name(f".{path.stem[:100]}-{secrets.token_hex(4)}{path.suffix}")
