"""What a training example is before it is read: a name, its captions, and where its pixels are.

Nothing here, in the sources and in `clips` imports jax, so that worker processes stay light.
"""

import ast
import collections
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int, UInt64

from dicode_jax.data.shapes_world import Scene
from dicode_jax.errors import UserError, printable
from dicode_jax.storage.files import MAX_TEXT

VIDEO_SUFFIXES = frozenset(
    (
        *(".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"),
        *(".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m"),
    )
)
IMAGE_SUFFIXES = frozenset((".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
MAX_NAME = 4096  # letters of a name; no file system takes longer paths

# Fields of a JSON object that hold captions, the first that is there counts; `name` is WebVid's.
CAPTION_FIELDS = ("captions", "caption", "text", "texts", "sentence", "description", "name")


_MAX_LISTED = 2**16  # letters of a list in a string: reading Python takes 400 times their memory


class BrokenRecord(UserError):
    """A record that cannot be read: one line with its name and what is wrong.

    A stream replaces such an example and counts it; every other error stops the run.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaFile:
    """Pixels in a file, or in a part of one.

    Attributes:
      path: The file.
      offset: Where they begin, in bytes.
      size: How many bytes they are; None for the rest of the file.
      suffix: Kind of the media, such as `.mp4`.
    """

    path: str
    suffix: str
    offset: int = 0
    size: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaBytes:
    """Pixels that are already in memory, as the bytes of a media file of kind `suffix`."""

    data: bytes
    suffix: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One video or picture of a data set.

    Attributes:
      name: Unique in its source, and the same wherever the data lie: a path relative to the root, a
        key in a shard.
      captions: All that are known; empty where none is.
      media: Where the pixels are, or the scene that is drawn.
    """

    name: str
    captions: tuple[str, ...]
    media: MediaFile | MediaBytes | Scene

    @property
    def is_image(self) -> bool:
        """Whether it is a picture, which gives one keyframe and no clip."""
        return not isinstance(self.media, Scene) and self.media.suffix in IMAGE_SUFFIXES


class ClipSource(Protocol):
    """Random access to the records of a data set; cheap to pickle, and reads no pixels.

    Attributes:
      left_out: One line for each thing that was found and is not a record, such as a shard that is
        cut short.
    """

    left_out: tuple[str, ...]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of a record, also of one that is broken."""
        ...

    def canonical_name(self, index: int) -> str:
        """The same for all names that a file can have; its hash decides on the side of a split."""
        ...

    def record(self, index: int) -> Record:
        """Looks a record up.

        Raises:
          BrokenRecord: Its captions cannot be read.
        """
        ...


class Subset:
    """Some records of a source, in the order of `indices`."""

    def __init__(self, source: ClipSource, indices: Int[np.ndarray, " n"]):
        self.left_out = source.left_out
        self._source, self._indices = source, np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def canonical_name(self, index: int) -> str:
        return self._source.canonical_name(int(self._indices[index]))

    def record(self, index: int) -> Record:
        return self._source.record(int(self._indices[index]))


class Strings(Sequence[str]):
    """Many strings in one piece of memory: 8 bytes each beyond their letters, quick to pickle."""

    def __init__(self, strings: Iterable[str]):
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._data = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside {len(self)} strings")
        index %= len(self)
        start, end = self._ends[index], self._ends[index + 1]
        return self._data[start:end].decode("utf-8", "surrogateescape")


def name_hash(name: str) -> int:
    """64 bits that a name always gives; they decide on which side of a split it is."""
    return int.from_bytes(hashlib.blake2b(name_bytes(name), digest_size=8).digest(), "big")


def name_bytes(name: str) -> bytes:
    """What stands for a name in hashes: its bytes on the disk, of no file's name bytes as well."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # halves of a character, which JSON can write
        return name.encode("utf-8", "surrogatepass")


def in_validation(hashes: UInt64[np.ndarray, " n"], share: float) -> np.ndarray:
    """Which names (as `name_hash` gives them) are held out: about `share` of them, bool [n]."""
    return np.asarray(hashes, np.uint64) < np.uint64(min(int(share * 2**64), 2**64 - 1))


def suffix_of(path: str) -> str:
    """The extension in lower case, with its dot."""
    return os.path.splitext(path)[1].lower()


def unread(names: Iterable[str]) -> list[str]:
    """A line that counts files of other kinds than media and captions, if there are any."""
    known = MEDIA_SUFFIXES | set(CAPTION_SUFFIXES)
    kinds = collections.Counter(suffix_of(name) or "no suffix" for name in names)
    kinds = {kind: count for kind, count in kinds.most_common() if kind not in known}
    shown = some([f"{printable(kind, 20)} ({count})" for kind, count in kinds.items()])
    return [f"{sum(kinds.values())} files of kinds that are not read: {shown}"] if kinds else []


def some(names: Sequence[str]) -> str:
    """The first few names, as one line, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(printable(name, 100) for name in names[:5]) + more


def told(left_out: Sequence[str]) -> list[str]:
    """What of the lines a log tells: the first hundred, and how many more there are."""
    lines, more = [*left_out[:100]], len(left_out) - 100
    return lines + [f"{more} more things, which `dicode data inspect` names"] * (more > 0)


def captions_from_text(text: str) -> tuple[str, ...]:
    """One caption per line that is not blank."""
    return tuple(line for line in map(str.strip, text.splitlines()) if line)


def captions_from_value(value: object) -> tuple[str, ...]:
    """Captions in a value of JSON or of a table: a string, a list, or an object with a field.

    A string may be a list of strings as JSON or Python writes it, which is what tables hold.

    Raises:
      ValueError: It is none of these.
    """
    if isinstance(value, dict):
        found = [value[field] for field in CAPTION_FIELDS if field in value]
        return captions_from_value(found[0]) if found else ()
    if value is None:
        return ()
    if isinstance(value, str):
        text = value.strip()
        return _listed(text) or ((text,) if text else ())
    if isinstance(value, list):
        return tuple(caption for item in value for caption in captions_from_value(item))
    raise ValueError(f"want a caption or a list of captions, got {type(value).__name__}")


def _listed(text: str) -> tuple[str, ...] | None:
    """The strings of a list that is written out in a string, or None if it is none."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for read in (json.loads, ast.literal_eval):
        if read is ast.literal_eval and len(text) > _MAX_LISTED:
            raise ValueError(f"a list of {len(text):,} letters that is not JSON")
        try:
            items = read(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            return None
        if read is ast.literal_eval and re.search(r"""['"]\s+['"]""", text):  # they would be glued
            raise ValueError(f"a list of captions without commas between them: {text[:60]}")
        return tuple(item.strip() for item in items if item.strip())
    return None


def parse_captions(name: str, parts: Iterable[tuple[str, bytes]]) -> tuple[str, ...]:
    """The captions of a record from its `(suffix, bytes)` parts, each once.

    Raises:
      BrokenRecord: A part is not UTF-8, not JSON, or holds something else; or they are too long.
    """
    return joined_captions(name, (_parse_part(name, suffix, data) for suffix, data in parts))


def _parse_part(name: str, suffix: str, data: bytes) -> tuple[str, ...]:
    try:
        text = data.decode("utf-8-sig")
        if suffix != ".json":
            return captions_from_text(text)
        return captions_from_value(json.loads(text))
    except (ValueError, RecursionError) as error:
        reason = printable(error, 200)
        raise BrokenRecord(f"{name}: its caption ({suffix}) cannot be read: {reason}") from error


def joined_captions(name: str, parts: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All captions of a record, each once.

    Raises:
      BrokenRecord: They are too long.
    """
    room, captions = MAX_TEXT, {}
    for caption in itertools.chain.from_iterable(parts):
        room -= len(caption)
        if room < 0:
            raise BrokenRecord(f"{name}: its captions have more than {MAX_TEXT:,} letters")
        captions[caption] = None
    return tuple(captions)
