"""Webdataset shards: plain tar files in which the members of an example share a key.

`0001.mp4`, `0001.txt` and `0001.json` are the example `0001`. A shard is gone through once; where
its members lie is kept in the user's cache folder, under the shard's path, size and time of change,
so that later starts read no headers.
"""

import collections
import contextlib
import hashlib
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import IO

import numpy as np

from dicode_jax.data.records import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    MAX_NAME,
    VIDEO_SUFFIXES,
    BrokenRecord,
    MediaFile,
    Record,
    Strings,
    name_bytes,
    name_hash,
    parse_captions,
    some,
    suffix_of,
    unread,
)
from dicode_jax.data.sources.identity import distinct_shards
from dicode_jax.errors import UserError, printable
from dicode_jax.storage.files import MAX_TEXT, atomic_path, cache_folder

_OTHERS = {tarfile.SYMTYPE: "links", tarfile.LNKTYPE: "links", tarfile.DIRTYPE: "folders"}
_NAMES_NEXT = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_DIGITS = re.compile(rb"(\d{1,7}) ")


class TarSource:
    """Examples of several shards, named `SHARD/KEY`."""

    def __init__(self, shards, members, names, places, ends, left_out):
        self.left_out: tuple[str, ...] = left_out
        self._paths = list(shards)
        self._shards = list(shards.values())  # what stands for each in a canonical name
        self._members = members  # Strings: the name of every member that is used
        self._names = names  # Strings: of records
        self._places = places  # int64 [members, 3]: shard, offset, size
        self._ends = ends  # int64 [records + 1]: record i has the members ends[i] to ends[i + 1]

    @classmethod
    def open(cls, paths: list[str], *, images: bool) -> tuple["TarSource", np.ndarray]:
        """Finds the members of all shards; returns hashes of canonical names too.

        Raises:
          UserError: A shard cannot be read.
        """
        from tqdm import tqdm

        shards, left_out = distinct_shards(paths)
        members, names, places, ends, hashes = [], [], [], [0], []
        bar = tqdm(shards, desc="shards", unit="shard", leave=False, disable=None, delay=2)
        for shard, path in enumerate(bar):
            faults, found = _members_of(path)
            left_out += faults
            if again := len(found) - len({_normal(name) for name, _, _ in found}):
                left_out.append(f"{path}: {again} members have the name of an earlier one")
            left_out += [f"{path}: {line}" for line in unread(name for name, _, _ in found)]
            without, stills, mixed = 0, 0, []
            for key, parts in _by_key(found).items():
                chosen, unclear = _choose(key, parts, images)
                mixed += unclear
                if chosen is None:
                    known = any(suffix_of(name) in IMAGE_SUFFIXES for name, _, _ in parts)
                    without += not (known or unclear)
                    continue
                if suffix_of(chosen[0][0]) in VIDEO_SUFFIXES:
                    stills += sum(suffix_of(name) in IMAGE_SUFFIXES for name, _, _ in parts)
                names.append(f"{os.path.basename(path)}/{_key(parts[0][0])}")
                hashes.append(name_hash(f"{shards[path]}/{key}"))
                members += [name for name, _, _ in chosen]
                places += [(shard, offset, size) for _, offset, size in chosen]
                ends.append(len(members))
            if mixed:
                left_out.append(
                    f"{path}: {len(mixed)} members share the name up to the first dot with another "
                    f"example; rename them: {some(mixed)}"
                )
            if stills:
                left_out.append(f"{path}: {stills} pictures beside a video of the same name")
            if without:
                left_out.append(f"{path}: {without} examples without a video or picture")
        places = np.array(places, np.int64).reshape(-1, 3)
        ends = np.array(ends, np.int64)
        source = cls(shards, Strings(members), Strings(names), places, ends, tuple(left_out))
        return source, np.array(hashes, np.uint64)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def canonical_name(self, index: int) -> str:
        first = self._ends[index]
        return f"{self._shards[self._places[first, 0]]}/{_key(_normal(self._members[first]))}"

    def record(self, index: int) -> Record:
        name, parts = self._names[index], []
        first, *captions = range(self._ends[index], self._ends[index + 1])
        path, offset, size = self._place(first)
        suffix = suffix_of(self._members[first])
        media = MediaFile(path=path, suffix=suffix, offset=offset, size=size)
        if sum(self._place(i)[2] for i in captions) > MAX_TEXT:
            raise BrokenRecord(f"{name}: its captions have more than {MAX_TEXT:,} bytes")
        for i in captions:
            path, offset, size = self._place(i)
            try:
                with open(path, "rb") as file:
                    file.seek(offset)
                    parts.append((suffix_of(self._members[i]), file.read(size)))
            except OSError as error:
                raise BrokenRecord(f"{name}: cannot read {path}: {error.strerror}") from error
            if len(parts[-1][1]) < size:
                raise BrokenRecord(f"{name}: {path} is cut short")
        return Record(name=name, captions=parse_captions(name, parts), media=media)

    def _place(self, member: int) -> tuple[str, int, int]:
        """File of the shard, first byte, number of bytes."""
        shard, offset, size = map(int, self._places[member])
        return self._paths[shard], offset, size


def _normal(member: str) -> str:
    """The name under which a member is unpacked: `./a.mp4` is `a.mp4`."""
    return posixpath.normpath(member).lstrip("/")


def _key(member: str) -> str:
    """The path up to the first dot of the file name."""
    folder, base = posixpath.split(member)
    return posixpath.join(folder, base.split(".")[0])


def _by_key(members: list[tuple[str, int, int]]) -> dict[str, list[tuple[str, int, int]]]:
    """Members of one shard by the key of their normal names."""
    groups: dict[str, list[tuple[str, int, int]]] = {}
    for member in members:
        groups.setdefault(_key(_normal(member[0])), []).append(member)
    return groups


def _choose(key: str, parts, images: bool) -> tuple[list | None, list[str]]:
    """The video, else the picture, then its captions; None without one. And names that are unclear.

    A key ends at the first dot, so that `a_1.0.mp4` and `a_1.5.mp4` have one. Of several media the
    one called by the key alone is the example; captions are its own by the key or by its name.
    """
    kinds = (VIDEO_SUFFIXES, IMAGE_SUFFIXES) if images else (VIDEO_SUFFIXES,)
    for kind in kinds:
        media = [part for part in parts if suffix_of(part[0]) in kind]
        if not media:
            continue
        plain = [part for part in media if _stem(part[0]) == key]
        first = plain[0] if plain else media[0] if len(media) == 1 else None
        if first is None:
            return None, [name for name, _, _ in parts]
        own = {key, _stem(first[0]), _normal(first[0])}
        said = [part for end in CAPTION_SUFFIXES for part in parts if suffix_of(part[0]) == end]
        captions = [part for part in said if _stem(part[0]) in own]
        used = dict.fromkeys([first, *captions])
        again = {_normal(first[0])}  # a member of the same name is counted elsewhere
        unclear = [p[0] for p in (*media, *said) if p not in used and _normal(p[0]) not in again]
        return [*used], unclear
    return None, []


def _stem(member: str) -> str:
    return os.path.splitext(_normal(member))[0]


def _members_of(path: str) -> tuple[tuple[str, ...], list[tuple[str, int, int]]]:
    """Lines that say what is wrong with a shard, and `(name, offset, size)` of whole members."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    identity = f"whole members\n{os.path.realpath(path)}\n{status.st_size}\n{status.st_mtime_ns}"
    cache = cache_folder()
    if cache is None:
        return _scan(path, status.st_size)
    file = cache / "tar" / f"{hashlib.sha256(name_bytes(identity)).hexdigest()[:32]}.npz"
    # Of many kinds where the cache is damaged: zip files and arrays have their own errors.
    with contextlib.suppress(Exception), np.load(file) as stored:
        names = stored["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
        found = zip(names, *stored["places"].tolist(), strict=True)
        return tuple(str(line) for line in stored["faults"]), list(found)
    faults, members = _scan(path, status.st_size)
    blob = "".join(name + "\0" for name, _, _ in members).encode("utf-8", "surrogateescape")
    places = np.array([member[1:] for member in members], np.int64).reshape(-1, 2).T
    with contextlib.suppress(OSError, UserError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            names = np.frombuffer(blob, np.uint8)
            np.savez(temporary, names=names, places=places, faults=np.array(faults, np.str_))
    return faults, members


def _scan(path: str, size: int) -> tuple[tuple[str, ...], list[tuple[str, int, int]]]:
    members, faults, sparse, passed = [], [], [], collections.Counter()
    last = None
    try:
        with open(path, "rb") as file:
            for kind, name, offset, length in _headers(file, size):
                last = printable(name, 100)
                if offset + length > size:
                    faults.append(f"{path} is cut short inside {last}")
                    break
                if kind == tarfile.GNUTYPE_SPARSE:
                    sparse.append(name)
                elif kind not in tarfile.REGULAR_TYPES:
                    passed[_OTHERS.get(kind, "devices, pipes and parts of files")] += 1
                elif len(name) > MAX_NAME:
                    passed[f"members with a name of more than {MAX_NAME:,} letters"] += 1
                elif not os.path.basename(name).startswith("."):
                    members.append((name, offset, length))
    except ValueError as error:
        if last is None:
            faults.append(
                f"{path} is not a plain tar file ({error}); unpack it first if it is compressed"
            )
        else:
            faults.append(f"{path} is cut short or damaged after {last}: {error}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if sparse:
        faults.append(
            f"{path}: {len(sparse)} members are stored with holes, which are not read; pack them "
            f"without -S: {some(sparse)}"
        )
    passed.pop("folders", None)
    faults += [f"{path}: {n} {what}, which are passed over" for what, n in passed.items()]
    return tuple(printable(line, 1000) for line in faults), members


def _headers(file: IO[bytes], end: int) -> Iterator[tuple[bytes, str, int, int]]:
    """Type, name, offset and size of the members of a tar file of `end` bytes.

    Members with holes have GNU's type of them.

    Only single headers are left to tarfile. It would itself go back where a size is negative, read
    as much as the header of a long name claims, call itself for each of several, and need hours or
    all memory for some PAX headers. Here each step goes on by a block and reads `MAX_TEXT` bytes at
    most.

    Raises:
      ValueError: What is wrong with the next header.
    """
    at, said = 0, {}
    while True:
        file.seek(min(at, end))  # no disk knows places of 100 bits
        block = file.read(tarfile.BLOCKSIZE)
        if block == tarfile.NUL * tarfile.BLOCKSIZE:
            return
        if len(block) < tarfile.BLOCKSIZE:
            raise ValueError("its end mark is missing")
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except Exception as error:  # of many kinds, and others in each Python
            raise ValueError("a header that is none") from error
        at += tarfile.BLOCKSIZE
        kind, size = member.type, member.size
        if kind in _NAMES_NEXT:
            if not 0 <= size <= MAX_TEXT:
                raise ValueError(f"a name of {size} bytes")
            data = file.read(size)
            said |= {"path": _text(data)} if kind == tarfile.GNUTYPE_LONGNAME else _read_pax(data)
        elif kind not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            more = kind == tarfile.GNUTYPE_SPARSE and block[482]
            while more:  # blocks that say where the holes are
                at += tarfile.BLOCKSIZE
                more = file.read(tarfile.BLOCKSIZE)[504:505].strip(tarfile.NUL)
            size = int(said.get("size", size))
            if not (kind in tarfile.REGULAR_TYPES or kind not in tarfile.SUPPORTED_TYPES):
                size = 0  # whatever the header of a folder or a link says
            if size >= 0:
                name = said.get("GNU.sparse.name") or said.get("path") or member.name
                yield tarfile.GNUTYPE_SPARSE if "holes" in said else kind, name, at, size
            said = {}
        if size < 0:
            raise ValueError("a negative size")
        at += -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _read_pax(data: bytes) -> dict[str, str]:
    """`path`, `size` and `GNU.sparse.name` of a PAX header, and `holes` if it tells of any.

    Raises:
      ValueError: It is none.
    """
    said, at, data = {}, 0, data.rstrip(tarfile.NUL)
    while at < len(data):
        digits = _DIGITS.match(data, at)
        last = at + int(digits[1]) - 1 if digits else -1
        if digits is None or last < digits.end() or data[last : last + 1] != b"\n":
            raise ValueError("a PAX header that is none")
        key, _, value = data[digits.end() : last].partition(b"=")
        if key.startswith(b"GNU.sparse."):
            said["holes"] = ""
        if key in (b"path", b"GNU.sparse.name"):
            said[key.decode()] = _text(value)
        if key == b"size":
            if not re.fullmatch(rb"\d{1,19}", value):
                raise ValueError("an impossible size")
            said["size"] = value.decode()
        at = last + 1
    return said


def _text(data: bytes) -> str:
    return data.partition(tarfile.NUL)[0].decode("utf-8", "surrogateescape")
