"""Folders that commands write: whole or not at all, and never in place of anything not ours.

A folder is written under a hidden name beside its place, which it takes at the end. It carries a
mark, the file `.dicode_jax`, that lists what was written. Only a folder with this mark is ever
replaced, only when it holds nothing else, and then the listed files are deleted one by one.

A kill leaves hidden names beside the folder NAME: `.NAME-XXXXXXXX.new` is unfinished and can be
deleted; `.NAME-XXXXXXXX.old` is what stood there before. The next writer puts the latter back if
the kill came between the two renames that exchange them.
"""

import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence

from dicode_jax.errors import UserError
from dicode_jax.storage.files import atomic_path, is_file_name, read_object, short

__all__ = ["MARK", "REPORT", "check_folder", "is_report", "new_folder"]

MARK = ".dicode_jax"
FORMAT = "dicode_jax folder, version 1"

# What converters before the mark left; they wrote the report last.
REPORT = "conversion.json"
_EARLIER = re.compile(
    r"(\w+/)?(config\.json|model\.safetensors)|(text/)?tokenizer\.json|README\.md|conversion\.json"
)

_NOWHERE = object()  # the identity of what does not exist; equal to no other
Listed = Mapping[str, int | None]  # relative path -> size in bytes, None where it is not known


@contextlib.contextmanager
def new_folder(
    out: str | os.PathLike,
    *,
    sources: Iterable[str | os.PathLike] = (),
    overwrite: bool = False,
    keep: Sequence[str] = (),
    advice: str = "name a new folder",
) -> Iterator[pathlib.Path]:
    """Gives a folder to write to, which becomes `out` when the block ends well.

    Otherwise it is removed, and what was at `out` stays as it was.

    Args:
      out: Its folder is made if need be; a link stays one, and what it leads to is replaced.
      sources: Files and folders that are read: `out` must not be, hold or lie in one of them.
      overwrite: Replace a folder with our mark.
      keep: Files directly in `out` that may be anybody's and go along into the new folder.
      advice: What to do when `out` is there, for the error.

    Raises:
      UserError: `out` is in the way (see `check_folder`), or cannot be written.
    """
    options = {"overwrite": overwrite, "keep": keep, "advice": advice}
    target = check_folder(out, sources=tuple(sources), **options)
    fresh = _beside(target, "new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        kept = [name for name in keep if _is_file(target / name)]
        for name in kept:
            shutil.copy2(target / name, fresh / name)
        foreign = {name for name in kept if not _is_listed(target, name)}
        yield fresh
        _write_mark(fresh, foreign)
        _exchange(out, fresh, target, options)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_folder(
    out: str | os.PathLike,
    *,
    sources: Iterable[str | os.PathLike] = (),
    overwrite: bool = False,
    keep: Sequence[str] = (),
    advice: str = "name a new folder",
) -> pathlib.Path:
    """Refuses an output folder that is in the way; call it before long work.

    Args:
      out, sources, overwrite, keep, advice: See `new_folder`.

    Returns:
      Where `out` leads.

    Raises:
      UserError: `out` is, holds or lies in a source, or is a place to work in (the home folder, the
        current one, or one above these); it is a file; or it is a folder with something in it, and
        `overwrite` is not set, the mark is missing, or not all of it is on the mark's list.
    """
    if not is_file_name(out):
        raise UserError(f"no folder can be called {str(out)!r}")
    target = pathlib.Path(os.path.realpath(out))
    _check_place(out, target, sources)
    try:
        _put_back(target)
        if not os.path.lexists(target):
            return target
        if not target.is_dir():
            raise UserError(f"{out} is a file; --out names a folder")
        if any(target.iterdir()):
            if not overwrite:
                raise UserError(f"{out} is already there; {advice}")
            _own_files(out, target, keep)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return target


def is_report(path: pathlib.Path) -> bool:
    """Whether a file is the report of a conversion."""
    return str(_read_json(path).get("converter", "")).startswith("convert.")


def _exchange(
    out: str | os.PathLike, fresh: pathlib.Path, target: pathlib.Path, options: Mapping
) -> None:
    """Puts `fresh` in the place of `target`, whose own files are then deleted."""
    check_folder(out, **options)  # the work was long: something may have come in since
    if target.is_dir():
        shutil.copymode(target, fresh)
    if not target.is_dir() or not any(target.iterdir()):
        fresh.rename(target)
        return
    old = _beside(target, "old")
    try:
        target.rename(old)
        own = _own_files(out, old, options["keep"])
        fresh.rename(target)
    except BaseException:
        if old.is_dir() and not target.exists():
            old.rename(target)
        raise
    with contextlib.suppress(OSError):
        _remove(old, own)


def _own_files(out: str | os.PathLike, folder: pathlib.Path, keep: Sequence[str] = ()) -> list[str]:
    """All files below a folder of ours.

    Raises:
      UserError: It is not ours, or holds anything that is not.
    """
    listed = _read_mark(folder) or _earlier_list(folder)
    if listed is None:
        raise UserError(
            f"{out} is not a model that was written here, so it is left alone: move it away, or "
            "name another folder"
        )
    parents = {str(parent) for name in listed for parent in pathlib.PurePath(name).parents}
    own, todo = [], [folder]
    while todo:
        for entry in os.scandir(todo.pop()):
            name = str(pathlib.Path(entry.path).relative_to(folder))
            if entry.is_dir(follow_symlinks=False) and name in parents:
                todo.append(pathlib.Path(entry.path))
                continue
            is_file = entry.is_file(follow_symlinks=False)
            size = entry.stat(follow_symlinks=False).st_size
            if is_file and (name in (MARK, *keep) or listed.get(name, -1) in (None, size)):
                own.append(name)
                continue
            changed = " (changed since)" if is_file and name in listed else ""
            raise UserError(
                f"{out} holds {name}{changed}, which was not written here: move it away, or "
                "name another folder"
            )
    return own


def _remove(folder: pathlib.Path, own: Sequence[str]) -> None:
    """Deletes files, the marks first: a folder without them is nobody's to put back."""
    for name in sorted(own, key=lambda name: (name not in (MARK, REPORT), name)):
        (folder / name).unlink()
    for parent in sorted({str(pathlib.PurePath(name).parent) for name in own}, reverse=True):
        (folder / parent).rmdir()


def _put_back(target: pathlib.Path) -> None:
    """Ends what a kill between two renames left: nothing at `target`, all of it beside it."""
    if os.path.lexists(target) or not target.parent.is_dir():
        return
    name = re.compile(rf"\.{re.escape(short(target.name))}-[0-9a-f]{{8}}\.old")
    for path in target.parent.iterdir():
        if name.fullmatch(path.name) and (_read_mark(path) or _earlier_list(path)) is not None:
            path.rename(target)
            return


def _check_place(
    out: str | os.PathLike, target: pathlib.Path, sources: Iterable[str | os.PathLike]
) -> None:
    """Compares by inode, so that no spelling, link or mount hides what is the same."""
    above = _identities(target)
    own = above.get(str(target), _NOWHERE)
    for place in (os.getcwd(), os.path.expanduser("~")):
        if own in _identities(place).values():
            raise UserError(f"{out} is a folder to work in; name a new folder inside it")
    for source in sources:
        for spelling in _spellings(source):
            found = _identities(spelling)
            if own in found.values():
                raise UserError(f"{out} is or holds {source}, which is read; name another folder")
            if found.get(spelling, _NOWHERE) in above.values():
                raise UserError(f"{out} lies in {source}, which is read; name another folder")


def _spellings(source: str | os.PathLike) -> Iterator[str]:
    """A source as it is named and where it leads; of a folder also where links in it lead."""
    path = os.path.abspath(source)
    yield os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    yield os.path.realpath(path)
    for folder, names, files in os.walk(path):
        for name in (*names, *files):
            if os.path.islink(inside := os.path.join(folder, name)):
                yield os.path.realpath(inside)


def _identities(path: str | os.PathLike) -> dict[str, object]:
    """Device and inode of a path and of every folder above it, of those that exist."""
    out = {}
    for place in (pathlib.Path(path), *pathlib.Path(path).parents):
        with contextlib.suppress(OSError):
            found = place.stat()
            out[str(place)] = (found.st_dev, found.st_ino)
    return out


def _write_mark(folder: pathlib.Path, foreign: Iterable[str]) -> None:
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    listed = {name: size for name, size in files.items() if name not in foreign}
    with atomic_path(folder / MARK) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, "files": listed}, indent=1) + "\n")


def _read_mark(folder: pathlib.Path) -> Listed | None:
    """What the mark lists; None without a mark directly in the folder."""
    mark = _read_json(folder / MARK)
    files = mark.get("files")
    if mark.get("format") != FORMAT or not isinstance(files, dict):
        return None
    return {name: size for name, size in files.items() if type(size) is int}


def _earlier_list(folder: pathlib.Path) -> Listed | None:
    """What a converter before the mark wrote; None without its report directly in the folder.

    A file that is newer than the report came later. A tokenizer beside a single module is ours only
    where the module was given rows for it.
    """
    if not is_report(folder / REPORT):
        return None
    report = _read_json(folder / REPORT)
    last = (folder / REPORT).stat().st_mtime_ns
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {str(path.relative_to(folder)) for path in files if path.stat().st_mtime_ns <= last}
    if "new_rows" not in report:
        names.discard("tokenizer.json")
    return dict.fromkeys(name for name in names if _EARLIER.fullmatch(name))


def _is_listed(folder: pathlib.Path, name: str) -> bool:
    listed = _read_mark(folder) or {}
    return listed.get(name, -1) == (folder / name).stat().st_size


def _read_json(path: pathlib.Path) -> dict:
    """The object in a regular file, empty when it is none."""
    try:
        return read_object(path, "a mark or a report") if _is_file(path) else {}
    except UserError:
        return {}


def _is_file(path: pathlib.Path) -> bool:
    """Whether a regular file is there, and no link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _beside(path: pathlib.Path, end: str) -> pathlib.Path:
    """A fresh hidden name in the same folder."""
    return path.with_name(f".{short(path.name)}-{secrets.token_hex(4)}.{end}")
