"""Webdataset shards: plain tar files in which the members of an example share a key.

`0001.mp4`, `0001.txt` and `0001.json` are the example `0001`. A shard is gone through once with the
standard tarfile; where its members lie is kept in the user's cache folder, under the shard's path,
size and time of change, so that later starts read no headers.
"""

import contextlib
import hashlib
import os
import posixpath
import tarfile

import numpy as np

from dicode_jax.data.records import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
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
from dicode_jax.storage.files import atomic_path, cache_folder


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
          UserError: A shard is compressed, or not a tar file at all.
        """
        from tqdm import tqdm

        shards, left_out = distinct_shards(paths)
        members, names, places, ends, hashes = [], [], [], [0], []
        bar = tqdm(shards, desc="shards", unit="shard", leave=False, disable=None, delay=2)
        for shard, path in enumerate(bar):
            fault, found = _members_of(path)
            left_out += fault.splitlines()
            again = len(found) - len({_normal(name) for name, _, _ in found})
            if again:
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
        for i in captions:
            path, offset, size = self._place(i)
            try:
                with open(path, "rb") as file:
                    file.seek(offset)
                    parts.append((suffix_of(self._members[i]), file.read(size)))
            except OSError as error:
                raise BrokenRecord(f"{name}: cannot read {path}: {error.strerror}") from error
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
        used = [first, *captions]
        again = {_normal(first[0])}  # a member of the same name is counted elsewhere
        unclear = [p[0] for p in (*media, *said) if p not in used and _normal(p[0]) not in again]
        return used, unclear
    return None, []


def _stem(member: str) -> str:
    return os.path.splitext(_normal(member))[0]


def _members_of(path: str) -> tuple[str, list[tuple[str, int, int]]]:
    """What is wrong with a shard, by lines, and `(name, offset, size)` of whole members."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    identity = f"all members\n{os.path.realpath(path)}\n{status.st_size}\n{status.st_mtime_ns}"
    cache = cache_folder()
    if cache is None:
        return _scan(path, status.st_size)
    file = cache / "tar" / f"{hashlib.sha256(name_bytes(identity)).hexdigest()[:32]}.npz"
    # Of many kinds where the cache is damaged: zip files and arrays have their own errors.
    with contextlib.suppress(Exception), np.load(file) as stored:
        names = stored["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
        found = zip(names, *stored["places"].tolist(), strict=True)
        return str(stored["fault"]), list(found)
    fault, members = _scan(path, status.st_size)
    blob = "".join(name + "\0" for name, _, _ in members).encode("utf-8", "surrogateescape")
    places = np.array([member[1:] for member in members], np.int64).reshape(-1, 2).T
    with contextlib.suppress(OSError, UserError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            names = np.frombuffer(blob, np.uint8)
            np.savez(temporary, names=names, places=places, fault=np.array(fault))
    return fault, members


def _scan(path: str, size: int) -> tuple[str, list[tuple[str, int, int]]]:
    members, fault, end = [], "", 0
    links = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                vars(tar)["members"].clear()  # tarfile would keep every header
                if member.size < 0:  # tarfile would go back, and round and round
                    raise tarfile.ReadError("a negative size")
                base = os.path.basename(member.name)
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                whole = member.offset_data + member.size <= size
                if not whole:
                    fault = f"{path} is cut short inside {printable(member.name)}"
                elif member.isreg() and not base.startswith("."):
                    members.append((member.name, member.offset_data, member.size))
                links += member.issym() or member.islnk()
            tar.fileobj.seek(end)
            # tarfile takes a header that is cut for the end of the archive.
            if not fault and tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                fault = f"{path} is cut short: its end mark is missing"
    except (tarfile.TarError, ValueError, ArithmeticError, MemoryError) as error:
        if not members:
            raise UserError(
                f"{path} is not a plain tar file ({error}); unpack it first if it is compressed"
            ) from error
        fault = fault or f"{path} is cut short or damaged ({error})"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    passed = f"{path}: {links} links, which are passed over" if links else ""
    return "\n".join(filter(None, (fault, passed))), members
