"""A folder of videos and pictures, with captions in files beside them."""

import array
import os
import posixpath
from collections.abc import Iterator

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
from dicode_jax.data.sources.identity import (
    FileNames,
    first_name,
    group,
    hash_files,
    leads_outside,
)
from dicode_jax.errors import UserError, printable
from dicode_jax.storage.files import read_small


class FolderSource:
    """Media files below `root`; `clip.mp4` has its captions in `clip.txt`, `clip.mp4.txt` or both.

    A file with several names is one record, under the first of them and with the captions beside
    any of them.
    """

    def __init__(self, root: str, fence: str | None, names: Strings, ends: np.ndarray):
        self.left_out: tuple[str, ...] = ()
        self._root, self._fence = root, fence
        self._names = names  # those of a record together
        self._ends = ends  # int64 [records + 1]: record i has the names ends[i] to ends[i + 1]

    @classmethod
    def open(
        cls, path: str, *, images: bool, fence: str | None = None
    ) -> tuple["FolderSource", np.ndarray]:
        """Lists a folder and those in it (or takes one file); hashes of canonical names too.

        Args:
          fence: A folder; links that lead outside of it are left out.

        Raises:
          UserError: There is no such folder or file, or it lies outside itself.
        """
        if fence is not None and leads_outside(path, fence):
            raise UserError(f"{path} lies outside of {fence}, which is given as root")
        if os.path.isfile(path):
            root, names = os.path.dirname(path) or ".", [os.path.basename(path)]
            others, unlisted = [], []
            if suffix_of(path) not in MEDIA_SUFFIXES:
                raise UserError(f"{path} is neither a video nor a picture, by its name")
        elif os.path.isdir(path):
            root, (names, others, unlisted) = path, files_below(path, fence)
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
        source = cls(root, fence, Strings(listed[i] for i in order), ends)
        source.left_out = tuple(left_out)
        return source, hash_files(canonical[order], ends, source.canonical_name)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, index: int) -> str:
        return self._names[self._ends[index]]

    def canonical_name(self, index: int) -> str:
        known = FileNames(self._root)
        return first_name(known.resolve(name)[0] for name in self._names_of(index))

    def record(self, index: int) -> Record:
        name = self.name(index)
        aliases, path = self._names_of(index), self._inside(name, name)
        stems = [stem for alias in aliases for stem in (os.path.splitext(alias)[0], alias)]
        captions = parse_captions(name, self._captions_of(name, stems))
        media = MediaFile(path=path, suffix=suffix_of(name))
        return Record(name=name, captions=captions, media=media)

    def _captions_of(self, name: str, stems: list[str]) -> Iterator[tuple[str, bytes]]:
        for stem in stems:
            for suffix in CAPTION_SUFFIXES:
                if os.path.lexists(os.path.join(self._root, stem + suffix)):
                    path = self._inside(name, stem + suffix)
                    try:
                        yield suffix, read_small(path)
                    except UserError as error:
                        raise BrokenRecord(f"{name}: {error}") from error

    def _inside(self, name: str, file: str) -> str:
        """The path of a file of this record, which links may since have led elsewhere."""
        path = os.path.join(self._root, file)
        if self._fence is not None and leads_outside(path, self._fence):
            raise BrokenRecord(f"{name}: {path} leads outside of {self._fence}")
        return path

    def _names_of(self, index: int) -> list[str]:
        return [self._names[i] for i in range(self._ends[index], self._ends[index + 1])]


def files_below(root: str, fence: str | None) -> tuple[list[str], list[str], list[str]]:
    """Relative paths of media files and of all others, sorted; a linked folder is followed once.

    And a line for each folder that cannot be listed, and for links that lead outside of `fence`.
    Folders may nest deeper than calls do.
    """
    found, others, left_out, outside = [], [], [], []
    seen, todo = set(), [""]
    while todo:
        folder = todo.pop()
        path, below = os.path.join(root, folder) if folder else root, []
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = [*os.scandir(path)]
        except OSError as error:
            left_out.append(f"cannot list {printable(path, 200)}: {error.strerror}")
            continue
        for entry in entries:
            name, is_link = posixpath.join(folder, entry.name), entry.is_symlink()
            if entry.name.startswith("."):
                continue
            if fence is not None and is_link and leads_outside(entry.path, fence):
                outside.append(name)
            elif os.path.isdir(entry.path) if is_link else entry.is_dir():
                below.append(name)
            else:
                (found if suffix_of(name) in MEDIA_SUFFIXES else others).append(name)
        todo += sorted(below, reverse=True)
    if outside:
        left_out.append(f"{len(outside)} links lead outside of {fence}: {some(sorted(outside))}")
    return sorted(found), sorted(others), left_out
