"""Output files that are checked before the work and appear only when they are whole."""

import contextlib
import fcntl
import json
import math
import os
import pathlib
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dicode_jax.errors import UserError, printable

MAX_TEXT = 1 << 20  # bytes of a text that a person wrote, such as a caption or a config
MAX_OBJECT = 1 << 26  # bytes of JSON that a program wrote, such as the index of many shards
MAX_DEPTH = 100  # levels of JSON


def check_output(
    path: str | os.PathLike,
    suffixes: Sequence[str],
    *,
    sources: Iterable[str | os.PathLike] = (),
) -> pathlib.Path:
    """Makes sure that `path` can be written, without leaving a trace of the trial.

    Args:
      path: The file; a link leads to it.
      suffixes: Extensions that it may have.
      sources: Files that the command reads.

    Raises:
      UserError: the extension is not one of `suffixes`, the folder is missing or cannot be written,
        or `path` is a folder, a pipe, a device or one of `sources`.
    """
    path = pathlib.Path(path)
    known = ", ".join(suffixes)
    if path.suffix.lower() not in suffixes:
        found = f"the extension {path.suffix!r}" if path.suffix else "no extension"
        raise UserError(f"{path} has {found}; write to one of: {known}")
    target = resolve_output(path)
    if target.suffix.lower() not in suffixes:
        raise UserError(f"{path} leads to {target}, which has another extension than: {known}")
    folder = target.parent if os.path.islink(path) else path.parent
    if not os.path.isdir(folder):
        raise UserError(f"the output folder {folder} does not exist; make it first")
    if os.path.exists(target) and not os.access(target, os.W_OK):
        raise UserError(f"{path} exists and is write-protected")
    sources = list(sources)
    check_no_source(path, sources)
    check_no_source(part_of(path), sources)
    trial = _temporary(target)
    try:
        _create(trial)
        trial.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write into the folder {folder}: {error.strerror or error}"
        ) from error
    return path


def is_file_name(path: str | os.PathLike) -> bool:
    """Whether a file could be called so: with no null character and no half of a character."""
    try:
        return b"\0" not in os.fsencode(path)
    except ValueError:
        return False


def make_folder(path: str | os.PathLike) -> pathlib.Path:
    """A folder that is there, with all above it.

    Raises:
      UserError: It cannot be made, or is a file.
    """
    path = pathlib.Path(path)
    if not is_file_name(path):
        raise UserError(f"no folder can be called {str(path)!r}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from error
    return path


def cache_folder() -> pathlib.Path | None:
    """Where this user keeps what can be made again; None for a user without a home.

    It need not exist, and may not be writable: work goes on without it.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # its specification passes over others
        home = os.path.expanduser("~") if os.environ.get("HOME") != "" else ""
        if not os.path.isabs(home):  # as containers may have it: nowhere in the list of users
            return None
        cache = os.path.join(home, ".cache")
    return pathlib.Path(cache, "dicode_jax")


def refuse_pointer(start: bytes, path: str | os.PathLike) -> None:
    """Refuses what Git LFS leaves in place of a large file.

    Args:
      start: The file's first bytes, 40 or more.

    Raises:
      UserError: It is such a pointer.
    """
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer and not the file itself: run git lfs pull")


def read_small(path: str | os.PathLike, limit: int = MAX_TEXT) -> bytes:
    """What is in a small file. Pipes and devices, which may never end, are not opened.

    Args:
      limit: Bytes that it may have.

    Raises:
      UserError: It is not there, is no file, is larger or cannot be read, or Git LFS has it.
    """
    try:
        # Without waiting: a pipe that nobody writes would hold the opening itself.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:
            if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
                raise UserError(f"{path} is a pipe or a device, not a file")
            data = f.read(limit + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}") from error
    if len(data) > limit:
        raise UserError(f"{path} is too large: more than {limit} bytes")
    refuse_pointer(data, path)
    return data


def parse_json(text: str | bytes, name: object) -> Any:
    """JSON of a foreign file: no NaN, no infinity, no number beyond 64 bits, `MAX_DEPTH` levels.

    Args:
      name: What errors call it.

    Raises:
      UserError: It is none, or not such.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        found = json.loads(text, parse_int=_int, parse_float=_float, parse_constant=_float)
        level = [found]
        for _ in range(MAX_DEPTH):
            level = [x for held in level for x in _within(held)]
            if not level:
                break
        else:
            raise ValueError(f"more than {MAX_DEPTH} levels deep")
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else printable(error, 200)
        raise UserError(f"{name} is not valid JSON: {reason}") from error
    return found


def read_object(path: str | os.PathLike, what: str, limit: int = MAX_OBJECT) -> dict[str, Any]:
    """The object in a JSON file; see `parse_json`.

    Args:
      what: Says in an error what the file should be, such as "an index of shards".
      limit: Bytes that it may have.

    Raises:
      UserError: There is no such file, it cannot be read, is too large, or holds no JSON object.
    """
    data = parse_json(read_small(path, limit), path)
    if not isinstance(data, dict):
        raise UserError(f"{path} is not {what}: it holds no JSON object")
    return data


def _int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits} is no finite number")
    return number


def _within(held: Any) -> Iterable[Any]:
    return held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()


def check_no_source(path: str | os.PathLike, sources: Iterable[str | os.PathLike]) -> None:
    """Makes sure that writing `path` replaces none of the files that a command reads.

    Other spellings, links and hard links of a source are found too, and files anywhere below a
    source that is a folder.

    Raises:
      UserError: It would.
    """
    target = pathlib.Path(os.path.realpath(path))
    identity = _identity(target)
    for source in sources:
        real = pathlib.Path(os.path.realpath(source))
        inside = identity is not None and real in target.parents
        if target == real or inside or (identity is not None and identity == _identity(real)):
            raise UserError(f"{path} is read by this command (as {source}); write to another file")


def resolve_output(path: str | os.PathLike) -> pathlib.Path:
    """Where links lead: the file that is written, which may not exist yet.

    Raises:
      UserError: It is a folder, or no file that could be replaced: a pipe, a device, a socket.
    """
    if not is_file_name(path):
        raise UserError(f"no file can be called {str(path)!r}")
    target = pathlib.Path(os.path.realpath(path))
    try:
        mode = os.lstat(target).st_mode
    except OSError:
        return target  # it is not there, or whoever writes it will say what is wrong
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is a pipe, a device or a broken link; name a file")
    return target


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a name to write to, beside `path`, which takes the place of `path` at the end.

    When the block fails or is interrupted, the unfinished file is removed and whatever was at
    `path` stays as it was. Where `path` is a link, it stays one, and what it leads to is replaced.
    The file gets the usual permissions (safetensors would keep it private).

    Raises:
      UserError: `path` is no file, or cannot be written. An error of the block about another file,
        which it reads, is passed on.
    """
    target = resolve_output(path)
    temporary = _temporary(target)
    try:
        _create(temporary)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    except OSError as error:
        named = error.filename and os.fsdecode(error.filename)
        if named and pathlib.Path(named) not in (temporary, target):
            raise
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def part_of(path: str | os.PathLike) -> pathlib.Path:
    """Where a file that grows in sight lies until it is whole: `NAME.part.SUFFIX`, beside it."""
    target = pathlib.Path(os.path.realpath(path)) if os.path.islink(path) else pathlib.Path(path)
    return target.with_name(f"{short(target.stem)}.part{target.suffix}")


@contextlib.contextmanager
def growing_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives `part_of(path)` to write to, in sight, which takes the place of `path` at the end.

    When the block fails or is interrupted, whatever was written stays there until the next writer
    replaces it, and whatever was at `path` stays as it was.

    Raises:
      UserError: `path` or its part is no file, or cannot be written, or another process is at it.
    """
    target, part = resolve_output(path), part_of(path)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # no link, no pipe
        with open(os.open(part, flags, 0o666), "wb") as lock:
            if not stat.S_ISREG(os.fstat(lock.fileno()).st_mode):
                raise UserError(f"{part} is a pipe or a device; name another file than {path}")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is writing {part}; name another file") from None
            os.ftruncate(lock.fileno(), 0)
            try:
                yield part
                os.replace(part, target)
            finally:
                with contextlib.suppress(OSError):
                    if part.stat().st_size == 0:
                        part.unlink()
    except OSError as error:
        named = error.filename and os.fsdecode(error.filename)
        if named and pathlib.Path(named) not in (part, target):
            raise
        raise UserError(f"cannot write {part}: {error.strerror or error}") from error


def unfinished(path: pathlib.Path) -> list[pathlib.Path]:
    """What killed writers of `path` have left beside it under hidden names."""
    name = re.compile(rf"\.{re.escape(short(path.stem))}-[0-9a-f]{{8}}{re.escape(path.suffix)}")
    return [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]


def short(name: str) -> str:
    """As much of a name as leaves room for what stands around it: file systems count 255 bytes."""
    return os.fsencode(name)[:200].decode(errors="ignore")


def _temporary(path: pathlib.Path) -> pathlib.Path:
    """A fresh hidden name in the same folder with the same extension."""
    return path.with_name(f".{short(path.stem)}-{secrets.token_hex(4)}{path.suffix}")


def _create(path: pathlib.Path) -> None:
    """Makes an empty file where nothing is, not even a link."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))


def _identity(path: pathlib.Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
