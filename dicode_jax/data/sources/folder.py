"""A folder of videos and pictures, with captions in files beside them."""

import array
import os
import pathlib

import numpy as np

from dicode_jax.data.records import (
    CAPTION_SUFFIXES,
    MEDIA_SUFFIXES,
    VIDEO_SUFFIXES,
    BrokenRecord,
    MediaFile,
    Record,
    Strings,
    name_hash,
    parse_captions,
    some,
    suffix_of,
    unread,
)
from dicode_jax.data.sources.identity import FileNames, first_name, group, hash_files
from dicode_jax.errors import UserError


class FolderSource:
    """Media files below `root`; `clip.mp4` has its captions in `clip.txt`, `clip.mp4.txt` or both.

    A file with several names is one record, under the first of them and with the captions beside
    any of them.
    """

    def __init__(self, root: str, names: Strings, ends: np.ndarray, left_out: tuple[str, ...]):
        self.left_out = left_out
        self._root = root
        self._names = names  # those of a record together
        self._ends = ends  # int64 [records + 1]: record i has the names ends[i] to ends[i + 1]

    @classmethod
    def open(cls, path: str, *, images: bool) -> tuple["FolderSource", np.ndarray]:
        """Lists a folder and those in it (or takes one file); hashes of canonical names too."""
        if os.path.isfile(path):
            root, names = os.path.dirname(path) or ".", [os.path.basename(path)]
            others, unlisted = [], []
            if suffix_of(path) not in MEDIA_SUFFIXES:
                raise UserError(f"{path} is neither a video nor a picture, by its name")
        elif os.path.isdir(path):
            root, (names, others, unlisted) = path, _files_below(path)
        else:
            raise UserError(f"there is no folder {path}")
        videos = {os.path.splitext(name)[0] for name in names if suffix_of(name) in VIDEO_SUFFIXES}
        # The picture beside a video of the same name is a still of it, not an example.
        listed = [
            name
            for name in names
            if suffix_of(name) in VIDEO_SUFFIXES or os.path.splitext(name)[0] not in videos
        ]
        known = FileNames(root)
        canonical, files = array.array("Q"), array.array("Q")
        for name in listed:
            one, file = known.resolve(name)
            canonical.append(name_hash(one))
            files.append(canonical[-1] if file is None else file)
        wanted = [images or suffix_of(name) in VIDEO_SUFFIXES for name in listed]
        canonical = np.array(canonical, np.uint64)
        order, ends = group(np.array(files, np.uint64), canonical, np.array(wanted, bool))
        left_out, thumbnails, more = unlisted, len(names) - len(listed), len(order) - len(ends) + 1
        if thumbnails:
            left_out.append(f"{thumbnails} pictures beside a video of the same name")
        if more:
            left_out.append(f"{more} more names of files that have one; their captions are joined")
        owners = {os.path.splitext(name)[0] for name in names} | set(names)
        captions = [name for name in others if suffix_of(name) in CAPTION_SUFFIXES]
        orphans = [name for name in captions if os.path.splitext(name)[0] not in owners]
        if orphans:
            left_out.append(
                f"{len(orphans)} captions without a video or picture of their name: {some(orphans)}"
            )
        left_out += unread(others)
        source = cls(root, Strings(listed[i] for i in order), ends, tuple(left_out))
        return source, hash_files(canonical[order], ends, source.canonical_name)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, index: int) -> str:
        return self._names[self._ends[index]]

    def canonical_name(self, index: int) -> str:
        known = FileNames(self._root)
        return first_name(known.resolve(name)[0] for name in self._names_of(index))

    def record(self, index: int) -> Record:
        name, parts = self.name(index), []
        aliases = self._names_of(index)
        for stem in (stem for alias in aliases for stem in (os.path.splitext(alias)[0], alias)):
            for suffix in CAPTION_SUFFIXES:
                path = os.path.join(self._root, stem + suffix)
                if not os.path.exists(path):
                    continue
                if not os.path.isfile(path):  # to read a pipe would wait for ever
                    raise BrokenRecord(f"{name}: cannot read {path}: it is no file")
                try:
                    parts.append((suffix, pathlib.Path(path).read_bytes()))
                except OSError as error:
                    raise BrokenRecord(f"{name}: cannot read {path}: {error}") from error
        media = MediaFile(path=os.path.join(self._root, name), suffix=suffix_of(name))
        return Record(name=name, captions=parse_captions(name, parts), media=media)

    def _names_of(self, index: int) -> list[str]:
        return [self._names[i] for i in range(self._ends[index], self._ends[index + 1])]


def _files_below(root: str) -> tuple[list[str], list[str], list[str]]:
    """Relative paths of media files and of all others, sorted; a linked folder is followed once.

    And a line for each folder that cannot be listed.
    """
    found, others, seen, unlisted = [], [], set(), []
    note = lambda error: unlisted.append(f"cannot list {error.filename}: {error.strerror}")  # noqa: E731
    for folder, folders, files in os.walk(root, onerror=note, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                path = os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
                (found if suffix_of(name) in MEDIA_SUFFIXES else others).append(path)
    return sorted(found), sorted(others), unlisted
