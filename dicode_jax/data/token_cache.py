"""Deep tokens of a data set, made once and read again and again: shards, indexes, a manifest.

A cache is a folder:

    manifest.json                        what it was made with, counts, hashes; written last
    tokens-00003-of-00040.array_record   videos, one record each, uncompressed
    tokens-00003-of-00040.json           index of that shard: names, keyframes, broken files, hash

A record is in the safetensors format: `tokens` bfloat16 [k, n, z], `times` float64 [k] and `info`,
JSON text as uint8 with the name, the captions and the source of the video.

Letters: k keyframes of a video, n deep tokens of a keyframe, z their width.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from dicode_jax.errors import UserError
from dicode_jax.storage.files import atomic_path

MANIFEST = "manifest.json"
FORMAT = "dicode_jax token cache, version 1"
_DTYPES = {"BF16": ml_dtypes.bfloat16, "F64": np.float64, "U8": np.uint8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedVideo:
    """One video of a cache.

    Attributes:
      name: Unique in its data set (`ClipSource.canonical_name`); a split goes by it.
      captions: None, one or several.
      source: Where the video came from, for people.
      tokens: Deep tokens bfloat16 [k, n, z].
      times: When each keyframe is seen, float64 [k] in seconds from the video's beginning.
    """

    name: str
    captions: tuple[str, ...]
    source: str
    tokens: np.ndarray
    times: np.ndarray

    def to_bytes(self) -> bytes:
        """The record that holds it."""
        info = {"name": self.name, "captions": self.captions, "source": self.source}
        text = json.dumps(info).encode()
        arrays = {
            "tokens": np.ascontiguousarray(self.tokens, ml_dtypes.bfloat16),
            "times": np.ascontiguousarray(self.times, np.float64),
            "info": np.frombuffer(text, np.uint8),
        }
        return safetensors.numpy.save(arrays)

    @classmethod
    def from_bytes(cls, record: bytes) -> "CachedVideo":
        """Reads what `to_bytes` wrote."""
        arrays = {
            name: np.frombuffer(array["data"], _DTYPES[array["dtype"]]).reshape(array["shape"])
            for name, array in safetensors.deserialize(record)
        }
        info = json.loads(arrays["info"].tobytes())
        return cls(
            name=info["name"],
            captions=tuple(info["captions"]),
            source=info["source"],
            tokens=arrays["tokens"],
            times=arrays["times"],
        )


@dataclasses.dataclass(frozen=True)
class BrokenVideo:
    """A video that could not be read, and why."""

    name: str
    reason: str


def shard_path(folder: str | os.PathLike, index: int, count: int) -> pathlib.Path:
    """Name of a shard; its index lies beside it under `.json`."""
    return pathlib.Path(folder) / f"tokens-{index:05d}-of-{count:05d}.array_record"


def write_shard(path: pathlib.Path, videos: Iterable[CachedVideo | BrokenVideo]) -> None:
    """Writes a shard and then its index, each whole or not at all.

    The same videos give the same bytes. A shard counts as finished when its index is there.

    Raises:
      UserError: The disk is full, or the folder cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    names, num_keyframes, broken = [], [], {}
    with atomic_path(path) as temporary:
        temporary.touch()  # the writer itself would not say that it cannot
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        try:
            for video in videos:
                if isinstance(video, BrokenVideo):
                    broken[video.name] = video.reason
                    continue
                writer.write(video.to_bytes())
                names.append(video.name)
                num_keyframes.append(len(video.tokens))
        finally:
            _close(writer, path)
        reader = ArrayRecordReader(str(temporary))
        written = reader.num_records()
        reader.close()
        if written != len(names):
            raise UserError(f"cannot write {path}: only {written} of {len(names)} records arrived")
    index = {
        "bytes": path.stat().st_size,
        "sha256": hash_file(path),
        "names": names,
        "num_keyframes": num_keyframes,
        "broken": broken,
    }
    _write_json(path.with_suffix(".json"), index)


def _close(writer: Any, path: pathlib.Path) -> None:
    try:
        writer.close()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot write {path}: {' '.join(str(error).split())}") from error


def read_index(path: pathlib.Path) -> dict[str, Any] | None:
    """The index of a finished shard; None when the shard is not there or not whole.

    Returns:
      `names`, `num_keyframes`, `broken` (name -> reason), `bytes` and `sha256`.
    """
    index = path.with_suffix(".json")
    if not index.is_file() or not path.is_file():
        return None
    found = _read_json(index)
    return found if found["bytes"] == path.stat().st_size else None


def write_manifest(folder: pathlib.Path, num_shards: int, about: Mapping[str, Any]) -> None:
    """Writes `manifest.json`, which makes a folder of finished shards a cache.

    Args:
      folder: Holds every shard and its index.
      num_shards: How many there are.
      about: `tokenizer` (hash of its weights), `num_tokens`, `token_dim` and `settings`.
    """
    shards, broken = [], 0
    for path in (shard_path(folder, i, num_shards) for i in range(num_shards)):
        index = _read_json(path.with_suffix(".json"))
        broken += len(index["broken"])
        shards.append(
            {
                "file": path.name,
                "videos": len(index["names"]),
                "keyframes": sum(index["num_keyframes"]),
                "bytes": index["bytes"],
                "sha256": index["sha256"],
                "index_sha256": hash_file(path.with_suffix(".json")),
            }
        )
    counts = {name: sum(shard[name] for shard in shards) for name in ("videos", "keyframes")}
    manifest = {"format": FORMAT, **about, **counts, "broken": broken, "shards": shards}
    _write_json(folder / MANIFEST, manifest)


class TokenCache:
    """Random access to the videos of a cache. Can be pickled; readers open when they are needed.

    Args:
      folder: Written by `train.encode`.
      tokenizer: Hash of the tokenizer's weights (`weights.hash_module`) that the cache must be of;
        None accepts any.
      shape: `(n, z)` that the deep tokens must have; None accepts any.

    Attributes:
      manifest: The manifest as a dictionary.

    Raises:
      UserError: The cache is not finished, of another tokenizer or size, or a shard is missing or
        torn.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        tokenizer: str | None = None,
        shape: tuple[int, int] | None = None,
    ):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.folder = pathlib.Path(folder)
        self.manifest = read_manifest(self.folder)
        if tokenizer is not None and tokenizer != self.manifest["tokenizer"]:
            raise UserError(
                f"the cache {folder} was made with another tokenizer "
                f"({self.manifest['tokenizer'][:12]}, not {tokenizer[:12]}); encode the data again"
            )
        if shape is not None and shape != self.shape:
            raise UserError(
                f"the cache {folder} holds {self.shape[0]} tokens of width {self.shape[1]} per "
                f"keyframe, the model reads {shape[0]} of width {shape[1]}"
            )
        for shard in self.manifest["shards"]:
            _check_size(self.folder / shard["file"], shard["bytes"])
        if not len(self):
            raise UserError(f"the cache {folder} is empty: no video of its data set could be read")
        self._records = ArrayRecordDataSource(
            [
                _Part(str(self.folder / shard["file"]), take=shard["videos"])
                for shard in self.manifest["shards"]
            ]
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Deep tokens per keyframe and their width, `(n, z)`."""
        return self.manifest["num_tokens"], self.manifest["token_dim"]

    def __len__(self) -> int:
        return self.manifest["videos"]

    def __getitem__(self, index: int) -> CachedVideo:
        return CachedVideo.from_bytes(self._records[index])

    @functools.cached_property
    def names(self) -> Sequence[str]:
        """Names of all videos, in order."""
        return [name for index in self._indexes for name in index["names"]]

    @functools.cached_property
    def num_keyframes(self) -> np.ndarray:
        """Keyframes of all videos, in order: int32."""
        return np.concatenate(
            [np.asarray(index["num_keyframes"], np.int32) for index in self._indexes]
        )

    @property
    def broken(self) -> dict[str, str]:
        """Videos that could not be read when the cache was made, and why."""
        return {name: why for index in self._indexes for name, why in index["broken"].items()}

    @functools.cached_property
    def _indexes(self) -> list[dict[str, Any]]:
        paths = (self.folder / shard["file"] for shard in self.manifest["shards"])
        return [_read_json(path.with_suffix(".json")) for path in paths]

    def verify(self) -> None:
        """Reads everything and compares the hashes, with a progress bar.

        Raises:
          UserError: Files differ from what was written; they are named.
        """
        from tqdm import tqdm

        wrong = []
        for shard in tqdm(self.manifest["shards"], desc="verifying", unit="shard"):
            path = self.folder / shard["file"]
            hashes = {path: shard["sha256"], path.with_suffix(".json"): shard["index_sha256"]}
            wrong += [p.name for p, wanted in hashes.items() if hash_file(p) != wanted]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(
                f"the cache {self.folder} is damaged: {', '.join(wrong[:3])}{more}; delete "
                "these files and manifest.json, and encode again"
            )


@dataclasses.dataclass(frozen=True)
class _Part:
    """What `ArrayRecordDataSource` wants to know of a file, so that it opens none beforehand."""

    filename: str
    skip: int = 0
    take: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


def is_cache(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a finished cache."""
    return (pathlib.Path(folder) / MANIFEST).is_file()


def hash_file(path: pathlib.Path) -> str:
    """SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest of a finished cache.

    Raises:
      UserError: There is none, or it is of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        begun = any(folder.glob("tokens-*"))
        hint = "; it is not finished: run train.encode again" if begun else ""
        raise UserError(f"{folder} is no token cache, it has no {MANIFEST}{hint}")
    manifest = _read_json(path)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} is of the format {manifest.get('format')!r}, wanted {FORMAT!r}")
    return manifest


def _check_size(path: pathlib.Path, size: int) -> None:
    if not path.is_file():
        raise UserError(f"the cache has lost its shard {path}; encode again")
    held = path.stat().st_size
    if held != size:
        raise UserError(
            f"the shard {path} is torn, {held} bytes of {size}: delete it, encode again"
        )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and encode again") from error


def _write_json(path: pathlib.Path, data: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
