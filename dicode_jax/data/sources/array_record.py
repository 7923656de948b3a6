"""ArrayRecord shards of whole media files.

A record is one line of JSON, a newline, then the bytes of the media file:

    {"name": "clips/17.mp4", "captions": ["a dog runs"], "suffix": ".mp4"}
"""

import json
import os
import pathlib
import re
import struct
from collections.abc import Iterable, Sequence
from typing import IO, Any

import numpy as np

from dicode_jax.data.records import (
    MAX_NAME,
    MEDIA_SUFFIXES,
    BrokenRecord,
    MediaBytes,
    Record,
    captions_from_value,
    joined_captions,
    name_hash,
)
from dicode_jax.data.sources.identity import distinct_shards
from dicode_jax.errors import printable
from dicode_jax.storage.files import MAX_TEXT, atomic_path

_MAX_OPEN = 64  # shards at a time
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = (
    2**16,
    24,
    40,
)  # bytes, in Riegeli, which the shards are made of
_MIN_RECORD = 8  # bytes that a picture with its line of JSON takes, however well it is compressed
_PLACE = re.compile(rb"\x08([\x80-\xff]{0,9}[\0-\x7f])\x10")
_LIGHT, _MAX_RATIO = (
    2**26,
    16,
)  # bytes that any record may unpack to; times its size for longer ones


def pack(name: str, captions: Sequence[str], suffix: str, data: bytes) -> bytes:
    """One record, from the bytes of a media file of kind `suffix` (as `.mp4`)."""
    header = {"name": name, "captions": list(captions), "suffix": suffix}
    return json.dumps(header).encode() + b"\n" + data


def unpack(where: str, data: bytes) -> Record:
    """The record that `pack` wrote; `where` goes in front of its name.

    Raises:
      BrokenRecord: It is of another form.
    """
    end = data.find(b"\n", 0, MAX_TEXT)
    try:
        header = json.loads(data[: max(end, 0)])
        name, suffix = str(header["name"])[:MAX_NAME], str(header["suffix"]).lower()
        captions = captions_from_value(header.get("captions"))
    except Exception as error:  # of many kinds: whatever a stranger may have written
        raise BrokenRecord(
            f"{where}: does not begin with a line of JSON that has name, captions and suffix"
        ) from error
    if suffix not in MEDIA_SUFFIXES:
        shown = printable(repr(suffix), 60)
        raise BrokenRecord(f"{where}: holds {shown}, neither a video nor a picture")
    media = MediaBytes(data=data[end + 1 :], suffix=suffix)
    return Record(name=f"{where}/{name}", captions=joined_captions(where, [captions]), media=media)


def write_shard(path: str | os.PathLike, records: Iterable[bytes]) -> int:
    """Writes what `pack` made into one shard, whole or not at all; returns how many."""
    from array_record.python.array_record_module import ArrayRecordWriter

    count = 0
    with atomic_path(pathlib.Path(path)) as temporary:
        # One record per group: a record is then read without its neighbours.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        try:
            for record in records:
                writer.write(record)
                count += 1
        finally:
            writer.close()
    return count


class ArrayRecordSource:
    """Records of several shards, named `SHARD:NUMBER/NAME`.

    Which records are held out goes by shard and number, so that opening reads no record: their
    names lie in front of their media, which the format gives as a whole only.
    """

    def __init__(self, shards: dict[str, str], counts: list[int], left_out: tuple[str, ...] = ()):
        self.left_out = left_out
        self._paths = list(shards)
        self._shards = list(shards.values())  # what stands for each in a canonical name
        self._ends = np.cumsum(counts)
        self._readers: dict[int, Any] = {}
        self._heavy: dict[int, list[range]] = {}
        self._name = (-1, "")  # of the record that was read last: it is asked for next

    @classmethod
    def open(cls, paths: list[str]) -> tuple["ArrayRecordSource", np.ndarray]:
        """Counts the records of all shards; returns hashes of canonical names too."""
        shards, left_out = distinct_shards(paths)
        counts = []
        for path in shards:
            count, fault = _count(path)
            counts.append(count)
            if fault:
                left_out.append(f"{path} is not a whole ArrayRecord file ({fault})")
        source = cls(shards, counts, tuple(left_out))
        hashes = (name_hash(source.canonical_name(i)) for i in range(len(source)))
        return source, np.fromiter(hashes, np.uint64, len(source))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def name(self, index: int) -> str:
        place, name = self._name
        if place == index:
            return name
        try:
            return self.record(index).name
        except BrokenRecord:
            return self._where(*self._place(index))

    def canonical_name(self, index: int) -> str:
        shard, number = self._place(index)
        return f"{self._shards[shard]}:{number}"

    def record(self, index: int) -> Record:
        shard, number = self._place(index)
        where = self._where(shard, number)
        if shard not in self._readers:
            if len(self._readers) >= _MAX_OPEN:
                self._readers.pop(next(iter(self._readers)))
            self._readers[shard] = _open(self._paths[shard])
        try:
            if shard not in self._heavy:
                self._heavy[shard] = heavy_records(self._paths[shard])
            if any(number in numbers for numbers in self._heavy[shard]):
                raise MemoryError("a few bytes that unpack to far more")
            (data,) = self._readers[shard].read([number])
        except Exception as error:  # of many kinds: whatever is damaged
            raise BrokenRecord(f"{where}: cannot be read ({printable(error, 200)})") from error
        record = unpack(where, data)
        self._name = (index, record.name)
        return record

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index) - (int(self._ends[shard - 1]) if shard else 0)

    def _where(self, shard: int, number: int) -> str:
        return f"{os.path.basename(self._paths[shard])}:{number}"

    def __getstate__(self):
        return self.__dict__ | {"_readers": {}}


def _count(path: str) -> tuple[int, str]:
    """How many records a shard has, or 0 and what is wrong with it."""
    try:
        check_index(path)
        reader = _open(path)
        count = reader.num_records()
        reader.close()  # tells what was wrong
    except Exception as error:  # of many kinds: whatever is damaged
        return 0, printable(error, 200)
    if count > os.path.getsize(path) // _MIN_RECORD:
        return 0, f"it claims {count:,} records"
    return count, "" if count else "there is no record in it"


def heavy_records(path: str | os.PathLike) -> list[range]:
    """Numbers of the records of a shard that unpack to far more bytes than they take.

    Compressed zeros of a few kilobytes fill any memory. What the header of a chunk says of its size
    is looked at here; the reader itself unpacks no more than that.

    Raises:
      OSError: The shard cannot be read.
    """
    heavy, number, at = [], 0, 0
    with open(path, "rb", buffering=0) as file:
        while (header := _header(file, at)) is not None:
            held, count, is_heavy = header
            if is_heavy:
                heavy.append(range(number, number + count))
            number += count
            length = _CHUNK_HEADER + held
            blocks = (length + (at - _BLOCK_HEADER - 1) % _BLOCK) // (_BLOCK - _BLOCK_HEADER)
            at = max(at + length + blocks * _BLOCK_HEADER, at + count)
    return heavy


def check_index(path: str | os.PathLike) -> None:
    """Weighs what the reader unpacks when it opens a shard: the index, and what says where it is.

    That begins the last block, and is too short to be compressed: sizes, then a varint.

    Raises:
      ValueError: They are not there, or unpack to far more.
    """
    last = os.path.getsize(path) - _BLOCK
    with open(path, "rb", buffering=0) as file:
        file.seek(max(last, 0))
        begin = file.read(2 * _BLOCK_HEADER + 2 * _CHUNK_HEADER)
        body = begin[_BLOCK_HEADER + _CHUNK_HEADER :]
        place = _PLACE.match(body, 2 + body[1]) if len(body) > 1 else None
        if last < 0 or begin[8:16] != bytes(8) or body[:1] != b"\0" or place is None:
            raise ValueError("its index is not where it should be")
        index = sum((byte & 127) << (7 * i) for i, byte in enumerate(place[1]))
        for at in (last, index):
            header = _header(file, at)
            if header is None or header[2]:
                raise ValueError("its index unpacks to far more bytes than it takes")


def _header(file: IO[bytes], at: int) -> tuple[int, int, bool] | None:
    """Bytes and records of the chunk that begins at a place, and if it unpacks to far more."""
    if at >= os.fstat(file.fileno()).st_size:
        return None
    file.seek(at)
    header, cut = file.read(_CHUNK_HEADER + _BLOCK_HEADER), -at % _BLOCK
    if cut < _CHUNK_HEADER:  # the header of a block stands in between
        header = header[:cut] + header[cut + _BLOCK_HEADER :]
    if len(header) < _CHUNK_HEADER:
        return None
    held, kind, unpacked = struct.unpack_from("<8xQ8xQQ", header)
    return held, kind >> 8, unpacked > max(_LIGHT, _MAX_RATIO * held)


def _open(path: str):
    from array_record.python.array_record_module import ArrayRecordReader

    # No reading ahead: records are read in random order.
    return ArrayRecordReader(path, options="readahead_buffer_size:0")
