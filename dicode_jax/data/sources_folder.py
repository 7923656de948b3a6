"""A folder of videos and pictures, with captions in `.txt` and `.json` files beside them."""

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
    suffix_of,
)
from dicode_jax.errors import UserError


class FolderSource:
    """Media files below `root`; `clip.mp4` has its captions in `clip.txt`, `clip.json` or both."""

    def __init__(self, root: str, names: Strings, left_out: tuple[str, ...]):
        self.left_out = left_out
        self._root, self._names = root, names

    @classmethod
    def open(cls, path: str, *, images: bool) -> tuple["FolderSource", np.ndarray]:
        """Lists a folder and those in it (or takes one file); returns hashes of the names too."""
        if os.path.isfile(path):
            root, names = os.path.dirname(path) or ".", [os.path.basename(path)]
            if suffix_of(path) not in MEDIA_SUFFIXES:
                raise UserError(f"{path} is neither a video nor a picture, by its name")
        elif os.path.isdir(path):
            root, names = path, _media_below(path)
        else:
            raise UserError(f"there is no folder {path}")
        videos = {os.path.splitext(name)[0] for name in names if suffix_of(name) in VIDEO_SUFFIXES}
        kept, thumbnails = [], 0
        for name in names:
            if suffix_of(name) not in VIDEO_SUFFIXES:
                # The picture beside a video of the same name is a still of it, not an example.
                thumbnails += os.path.splitext(name)[0] in videos
                if not images or os.path.splitext(name)[0] in videos:
                    continue
            kept.append(name)
        left_out = (f"{thumbnails} pictures beside a video of the same name",) if thumbnails else ()
        hashes = np.array([name_hash(name) for name in kept], np.uint64)
        return cls(root, Strings(kept), left_out), hashes

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def record(self, index: int) -> Record:
        name = self._names[index]
        path = os.path.join(self._root, name)
        stem, parts = os.path.splitext(path)[0], []
        for suffix in CAPTION_SUFFIXES:
            try:
                parts.append((suffix, pathlib.Path(stem + suffix).read_bytes()))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise BrokenRecord(f"{name}: cannot read {stem + suffix}: {error}") from error
        media = MediaFile(path=path, suffix=suffix_of(path))
        return Record(name=name, captions=parse_captions(name, parts), media=media)


def _media_below(root: str) -> list[str]:
    """Relative paths of all media files, sorted; links are followed, each folder once."""
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if suffix_of(name) in MEDIA_SUFFIXES and not name.startswith("."):
                path = os.path.relpath(os.path.join(folder, name), root)
                found.append(path.replace(os.sep, "/"))
    return sorted(found)
