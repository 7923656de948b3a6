"""Examples that a frozen model has encoded: named arrays, made once and read again and again.

A cache is a folder:

    encode.json                           what it is made with; written first
    encoded-00003-of-00040.array_record   examples, one record each, uncompressed
    encoded-00003-of-00040.json           index of that shard: names, lengths, what was left out
    manifest.json                         kind, schema, counts, hashes of all files; written last

A record is in the safetensors format: the arrays of the schema, and `info`, JSON text as uint8 with
the name, the captions and the source of the example. A manifest of the last release, whose caches
held deep tokens alone, is read as one of today.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from dicode_jax import config as config_lib
from dicode_jax.data.cache_files import (
    KIND,
    MANIFEST,
    PLAN,
    VERSION,
    Schema,
    Spec,
    check_types,
    hash_file,
    read_as,
    read_index_file,
    read_json,
    read_manifest,
    write_json,
)
from dicode_jax.data.records import joined_captions
from dicode_jax.data.sources.array_record import check_index, heavy_records
from dicode_jax.errors import UserError, printable
from dicode_jax.storage.files import atomic_path, parse_json, read_object, unfinished


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One example of a cache.

    Attributes:
      name: Unique in its data set (`ClipSource.canonical_name`) where a split goes by it.
      arrays: Those that the schema names.
      captions: None, one or several.
      source: Where it came from, for people.
    """

    name: str
    arrays: Mapping[str, np.ndarray]
    captions: tuple[str, ...] = ()
    source: str = ""

    def to_bytes(self, schema: Schema) -> bytes:
        """The record that holds it, its arrays in the types of the schema.

        Raises:
          ValueError: An array is of another shape.
        """
        info = {"name": self.name, "captions": self.captions, "source": self.source}
        arrays = {"info": np.frombuffer(json.dumps(info).encode(), np.uint8)}
        for name, (dtype, shape) in schema.items():
            arrays[name] = x = np.asarray(self.arrays[name], dtype, order="C")
            _check_shape(f"{name} of {self.name}", x.shape, shape)
        return safetensors.numpy.save(arrays)

    @classmethod
    def from_bytes(cls, record: bytes, schema: Schema) -> "Example":
        """Reads what `to_bytes` wrote.

        Raises:
          UserError: It did not write this, or by another schema.
        """
        with read_as("a record of the cache"):
            held = dict(safetensors.deserialize(record))
            info = parse_json(bytes(held["info"]["data"]), "its info")
            check_types(list, [info["captions"]])
            check_types(str, [info["name"], info["source"], *info["captions"]])
            arrays = {
                name: np.frombuffer(held[name]["data"], dtype).reshape(held[name]["shape"])
                for name, (dtype, _) in schema.items()
            }
            for name, (_, shape) in schema.items():
                _check_shape(f"{name} of {info['name']}", arrays[name].shape, shape)
            captions = joined_captions(info["name"], [info["captions"]])
            return cls(**info | {"captions": captions}, arrays=arrays)


@dataclasses.dataclass(frozen=True)
class Broken:
    """A record that could not be read, and why."""

    name: str
    reason: str


def shard_path(folder: str | os.PathLike, index: int, count: int) -> pathlib.Path:
    """Name of a shard; its index lies beside it under `.json`."""
    return pathlib.Path(folder) / f"encoded-{index:05d}-of-{count:05d}.array_record"


def write_shard(
    path: pathlib.Path,
    examples: Iterable[Example | Broken],
    schema: Schema,
    data: Mapping[str, str],
) -> None:
    """Writes a shard and then its index, each whole or not at all.

    The same examples give the same bytes. A shard counts as finished when its index is there.

    Args:
      data: What the examples are made of (`data.sources.identity.fingerprint`).

    Raises:
      UserError: The disk is full, or the folder cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    names, broken = [], {}
    lengths = {name: [] for name, spec in schema.items() if None in spec.shape}
    for left_by_a_kill in unfinished(path) if path.parent.is_dir() else ():
        left_by_a_kill.unlink()
    with atomic_path(path) as temporary:
        temporary.touch()  # the writer itself would not say that it cannot
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        try:
            for example in examples:
                if isinstance(example, Broken):
                    broken[example.name] = example.reason
                    continue
                writer.write(example.to_bytes(schema))
                names.append(example.name)
                for name, held in lengths.items():
                    axis = schema[name].shape.index(None)
                    held.append(np.shape(example.arrays[name])[axis])
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
        "data": data,
        "names": names,
        "lengths": lengths,
        "broken": broken,
    }
    write_json(path.with_suffix(".json"), index)


def _close(writer: Any, path: pathlib.Path) -> None:
    try:
        writer.close()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot write {path}: {' '.join(str(error).split())}") from error


def read_index(path: pathlib.Path) -> dict[str, Any] | None:
    """The index of a finished shard; None when the shard is not there or not whole.

    Returns:
      `names`, `lengths` (of the axis that varies, by the name of the array), `broken` (name ->
      reason), `data` (what `write_shard` was told), `bytes` and `sha256`.
    """
    index = path.with_suffix(".json")
    if not os.path.isfile(index) or not os.path.isfile(path):
        return None
    found = read_index_file(index)
    return found if found["bytes"] == path.stat().st_size else None


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int | None, ...]) -> None:
    fits = [want in (None, size) for want, size in zip(wanted, found, strict=False)]
    if len(wanted) != len(found) or not all(fits):
        raise ValueError(f"{name} is {found}, the schema says {wanted}")


def stale(shards: Mapping[pathlib.Path, Mapping[str, str]]) -> dict[pathlib.Path, list[str]]:
    """Finished shards that were written of other `data` than these, and what of it has changed."""
    found = {}
    for path, data in shards.items():
        index = read_index(path)
        if index is not None and index.get("data") != data:
            earlier = index.get("data") or {}
            found[path] = [name for name, x in data.items() if x != earlier.get(name)]
    return found


def write_plan(folder: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Notes what goes into a folder: `encoder`, the hash of its weights, and `settings`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN, about)


def changes(folder: pathlib.Path, about: Mapping[str, Any]) -> list[str] | None:
    """What of the plan in a folder is another now, a phrase each; None where there is no plan.

    Raises:
      UserError: There is a file of that name that is no plan.
    """
    path = folder / PLAN
    if not os.path.lexists(path):
        return None
    try:
        plan = read_object(path, "of a cache")
        # The last release called the encoder so, and noted three things less or more.
        plan["encoder"] = plan.pop("tokenizer", None) or plan["encoder"]
        plan["settings"].pop("names_sha256", None)
        earlier = {"settings.data.antialias": True, **config_lib.leaves(plan)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not of a cache; take another folder") from error

    now = config_lib.leaves(json.loads(json.dumps(about)))  # tuples are lists there
    now = {"settings.data.antialias": True, **now}

    def short(value: Any) -> Any:
        return value[:12] if isinstance(value, str) and len(value) == 64 else value  # a hash

    return [
        printable(f"{name} {short(earlier.get(name))} -> {short(now.get(name))}", 200)
        for name in sorted({*earlier, *now} - {"num_tokens", "token_dim"})
        if earlier.get(name) != now.get(name)
    ]


def write_manifest(folder: pathlib.Path, num_shards: int, schema: Schema) -> None:
    """Writes `manifest.json`, which makes a folder with a plan and finished shards a cache."""
    shards, indexes, data = [], [], hashlib.sha256()
    lengths = {name: 0 for name, spec in schema.items() if None in spec.shape}
    for path in (shard_path(folder, i, num_shards) for i in range(num_shards)):
        index = read_index_file(path.with_suffix(".json"))
        indexes.append(index)
        with read_as(path.with_suffix(".json")):
            lengths = {name: held + sum(index["lengths"][name]) for name, held in lengths.items()}
        data.update(json.dumps(index.get("data"), sort_keys=True).encode())
        shards.append(
            {
                "file": path.name,
                "count": len(index["names"]),
                "bytes": index["bytes"],
                "sha256": index["sha256"],
                "index_sha256": hash_file(path.with_suffix(".json")),
            }
        )
    manifest = {
        "kind": KIND,
        "version": VERSION,
        **read_json(folder / PLAN),
        "data": data.hexdigest(),
        "schema": {name: spec._asdict() for name, spec in schema.items()},
        "count": sum(shard["count"] for shard in shards),
        "lengths": lengths,
        "broken": sum(len(index["broken"]) for index in indexes),
        "shards": shards,
    }
    write_json(folder / MANIFEST, manifest)


class EncodedCache:
    """Random access to the examples of a cache. Can be pickled; readers open when they are needed.

    Args:
      folder: Written by `train.encode`, or by a training beside its run.

    Attributes:
      manifest: The manifest as a dictionary.
      schema: Type and shape of every array.

    Raises:
      UserError: The cache is not finished, empty, or a shard is missing or torn.
    """

    def __init__(self, folder: str | os.PathLike):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.folder = pathlib.Path(folder)
        self.manifest = read_manifest(self.folder)
        self.schema: Schema = {
            name: Spec(spec["dtype"], tuple(spec["shape"]))
            for name, spec in self.manifest["schema"].items()
        }
        for shard in self.manifest["shards"]:
            _check_size(self.folder / shard["file"], shard["bytes"])
        if not len(self):
            raise UserError(f"the cache {folder} is empty: nothing of its data set could be read")
        parts: Any = [
            _Part(str(self.folder / shard["file"]), take=shard["count"])
            for shard in self.manifest["shards"]
        ]
        self._records = ArrayRecordDataSource(parts)
        self._ends = np.cumsum([shard["count"] for shard in self.manifest["shards"]])
        self._weighed: set[int] = set()
        self._lengths: dict[str, np.ndarray] = {}

    @classmethod
    def shared(cls, folder: str | os.PathLike) -> "EncodedCache":
        """A cache that any training may read, as `train.encode` writes them.

        Raises:
          UserError: It is none, or a run's own.
        """
        cache = cls(folder)
        held = cache.manifest.get("settings")
        if isinstance(held, dict) and {"run", "seed"} <= held.keys():
            raise UserError(
                f"{folder} is what a run encoded for itself, by its own seed and settings: encode "
                "the data by train.encode --out NEW, which any run reads"
            )
        return cache

    def __len__(self) -> int:
        return self.manifest["count"]

    def setting(self, name: str) -> Any:
        """What the cache was made with, by its dotted name in the `settings` of the manifest.

        Raises:
          UserError: They do not say.
        """
        held = self.manifest.get("settings")
        for part in name.split("."):
            if not isinstance(held, dict) or part not in held:
                raise UserError(
                    f"{self.folder / MANIFEST} says no {name}; delete it and encode again"
                )
            held = held[part]
        return held

    def __getitem__(self, index: int) -> Example:
        """An example.

        Raises:
          IndexError: There are not as many.
          UserError: Its shard is damaged, or holds something else than its index says.
        """
        index = range(len(self))[index]
        shard = int(np.searchsorted(self._ends, index, side="right"))
        path = self.folder / self.manifest["shards"][shard]["file"]
        with read_as(path):
            if shard not in self._weighed:
                check_index(path)
                if heavy_records(path):
                    raise MemoryError("a few bytes of it unpack to far more")
            self._weighed.add(shard)
            example = Example.from_bytes(self._records[index], self.schema)
            lengths = {
                name: (x.shape[self.schema[name].shape.index(None)], self.lengths(name)[index])
                for name, x in example.arrays.items()
                if None in self.schema[name].shape
            }
            if example.name != self.names[index] or any(a != b for a, b in lengths.values()):
                raise ValueError(f"example {index} is not what its index says")
            return example

    @functools.cached_property
    def names(self) -> list[str]:
        """Names of all examples, in order."""
        return [name for index in self._indexes for name in index["names"]]

    def lengths(self, name: str) -> np.ndarray:
        """Lengths of the axis that varies in an array, of all examples in order: int32."""
        if name not in self._lengths:
            # The last release's indexes know those of deep tokens alone.
            with read_as(self.folder):
                held = (x.get("num_keyframes") or x["lengths"][name] for x in self._indexes)
                self._lengths[name] = np.concatenate([np.asarray(x, np.int32) for x in held])
        return self._lengths[name]

    @property
    def broken(self) -> dict[str, str]:
        """Records that could not be read when the cache was made, and why."""
        return {name: why for index in self._indexes for name, why in index["broken"].items()}

    @functools.cached_property
    def _indexes(self) -> list[dict[str, Any]]:
        indexes = []
        for shard in self.manifest["shards"]:
            path = (self.folder / shard["file"]).with_suffix(".json")
            indexes.append(read_index_file(path))
            if len(indexes[-1]["names"]) != shard["count"]:
                raise UserError(f"{path} and {MANIFEST} count other examples; encode again")
        return indexes

    def verify(self) -> None:
        """Reads everything and compares the hashes, with a progress bar.

        Raises:
          UserError: Files differ from what was written; they are named.
        """
        from tqdm import tqdm

        wrong = []
        shards = self.manifest["shards"]
        for shard in tqdm(shards, desc="verifying", unit="shard", disable=None):
            path = self.folder / shard["file"]
            hashes = {path: shard["sha256"], path.with_suffix(".json"): shard["index_sha256"]}
            wrong += [p.name for p, wanted in hashes.items() if hash_file(p) != wanted]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(
                f"the cache {self.folder} is damaged: {', '.join(wrong[:3])}{more}; delete "
                "these files and manifest.json, and encode again"
            )


TokenCache = EncodedCache  # as the last release called it


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


def _check_size(path: pathlib.Path, size: int) -> None:
    if not os.path.isfile(path):
        raise UserError(f"the cache has lost its shard {path}: delete {MANIFEST}, encode again")
    held = path.stat().st_size
    if held != size:
        raise UserError(
            f"the shard {path} is torn, {held} bytes of {size}: delete it and {MANIFEST}, and "
            "encode again"
        )
