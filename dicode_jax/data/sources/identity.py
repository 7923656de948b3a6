"""Which names stand for one file, which of them decides on its side of a split, and its content.

A data set may call a file by several names: other spellings of its path, links, hard links, another
case where the file system does not mind. The disk tells: one device and inode is one file.
"""

import errno
import functools
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Int, UInt64

from dicode_jax.data.records import (
    BrokenRecord,
    ClipSource,
    MediaBytes,
    MediaFile,
    name_bytes,
    name_hash,
)


class FileNames:
    """Names of files that are relative to `root`, or absolute. Folders are resolved once."""

    def __init__(self, root: str):
        self._root = root
        # Where a file lies, and how it is spelled, against what `root` is in the same terms.
        self._real_top = os.path.join(os.path.realpath(root), "")
        self._spelled_top = os.path.join(os.path.abspath(root), "")
        self._folder = functools.lru_cache(2**16)(self._resolve_folder)

    def resolve(self, name: str) -> tuple[str, int | None]:
        """Asks the disk once about the file that has this name; about a link, once more.

        Returns:
          Its canonical name: the real path below the real `root`; of a file that lies outside, the
          name without detours, so that it is the same wherever outside may be. And 64 bits that all
          names of the file share while it does not change; None if there is no such file.
        """
        folder, base = os.path.split(name)
        try:
            real, prefix = self._folder(folder)
        except (OSError, ValueError):  # such as too many links in a row, a null character
            return os.path.normpath(name), None
        path, canonical = real + base, prefix + base
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                path = real_path(path)
                if path.startswith(self._real_top):
                    canonical = _below(self._real_top, path)
                status = os.stat(path)
        except (OSError, ValueError):
            return canonical, None
        # Some network file systems make inodes up: two files with one differ in size or time.
        file = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        return canonical, hash(file) % 2**64

    def _resolve_folder(self, folder: str) -> tuple[str, str]:
        """Where a folder lies, and its canonical name; a file's name is put behind either."""
        folder = re.sub("^/+", "/", folder)  # two slashes would stay two
        path = os.path.join(self._root, folder)
        real, spelled = (os.path.join(f(path), "") for f in (real_path, os.path.abspath))
        if real.startswith(self._real_top):
            return real, _below(self._real_top, real)
        if os.path.realpath(spelled) != os.path.realpath(path):  # `link/..` is not beside the link
            return real, real
        if spelled.startswith(self._spelled_top):
            return real, _below(self._spelled_top, spelled)
        return real, os.path.join(os.path.normpath(folder), "").replace(os.sep, "/")


def leads_outside(path: str, root: str) -> bool:
    """Whether a file lies outside of a folder, when links are resolved; also if that is unknown."""
    try:
        top, path = (os.path.join(real_path(p), "") for p in (root, path))
    except (OSError, ValueError):
        return True
    return not path.startswith(top)


def real_path(path: str) -> str:
    """Where links lead.

    Raises:
      OSError: They are more in a row than a disk follows; Python would call itself for each.
      ValueError: No file can be called so.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise
    return os.path.realpath(path)


def _below(top: str, path: str) -> str:
    return path[len(top) :].replace(os.sep, "/")


def first_name(names: Iterable[str]) -> str:
    """Which of the canonical names of one file decides on its side: the first, best below the root.

    A file has several when it has hard links, or lies outside and is reached in several ways.
    """
    return min(names, key=lambda name: (name.startswith(("../", "/")), name))


def group(
    files: UInt64[np.ndarray, " n"],
    canonical: UInt64[np.ndarray, " n"],
    wanted: Bool[np.ndarray, " n"],
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " k+1"]]:
    """Puts the names of one file side by side, files in the order in which they come first.

    Args:
      files: Of each name, what `FileNames.resolve` says of the file, or any 64 bits of its own.
      canonical: Hashes of the canonical names; equal ones are one file too.
      wanted: A file whose first name is not wanted is left out.

    Returns:
      Indices of names, and ends: file i has the names `order[ends[i] : ends[i + 1]]`.
    """
    _, first, same = np.unique(canonical, return_index=True, return_inverse=True)
    files = files[first[same]]
    _, first, same = np.unique(files, return_index=True, return_inverse=True)
    first = first[same]
    order = np.argsort(first, kind="stable")
    order = order[wanted[first[order]]]
    _, counts = np.unique(first[order], return_counts=True)
    return order, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def differs(values: UInt64[np.ndarray, " m"], ends: Int[np.ndarray, " k+1"]) -> np.ndarray:
    """Which values, in the order of `group`, are not those of the first of their file: bool [m]."""
    return values != np.repeat(values[ends[:-1]], np.diff(ends))


def hash_files(
    canonical: UInt64[np.ndarray, " m"],
    ends: Int[np.ndarray, " k+1"],
    canonical_name: Callable[[int], str],
) -> UInt64[np.ndarray, " k"]:
    """The hash that decides on the side of each file, of hashes in the order of `group`.

    Only of a file with several canonical names, of which there are few, is the name asked for.
    """
    hashes = canonical[ends[:-1]]
    places = np.flatnonzero(differs(canonical, ends))
    for index in np.unique(np.searchsorted(ends, places, side="right") - 1):
        hashes[index] = name_hash(canonical_name(int(index)))
    return hashes


def distinct_shards(paths: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Shards of a list in which one may come under several names.

    Returns:
      For every shard the path that is read and the name that stands for it in a split (its own, or
      that of the file in the same folder that it links to); and a line for each path left out.
    """
    shards: dict[int | str, list[tuple[str, str]]] = {}
    for path in paths:
        folder, base = os.path.split(path)
        canonical, file = FileNames(folder or ".").resolve(base)
        shards.setdefault(file or path, []).append((os.path.basename(canonical), path))
    kept, left_out = {}, []
    for names in shards.values():
        name, path = min(names, key=lambda pair: pair[0])
        kept[path] = name
        left_out += [f"{other} is the shard {path}" for _, other in names if other != path]
    return kept, left_out


def fingerprint(source: ClipSource, indices: Iterable[int]) -> dict[str, str]:
    """What some records are made of now: hashes of their `captions` and of their `files`.

    A file is known by its size and the time of its last change, a medium in memory by its bytes.
    """
    captions, files = hashlib.sha256(), hashlib.sha256()
    for index in indices:
        try:
            record = source.record(int(index))
        except BrokenRecord as error:
            captions.update(name_bytes(f"{error!s}\n"))
            continue
        held: object = record.media  # a scene
        if isinstance(record.media, MediaFile):
            held = (record.media.offset, record.media.size, _status(record.media.path))
        elif isinstance(record.media, MediaBytes):
            held = hashlib.sha256(record.media.data).digest()
        files.update(repr((record.name, held)).encode())
        captions.update(repr((record.name, record.captions)).encode())
    return {"captions": captions.hexdigest(), "files": files.hexdigest()}


def _status(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
