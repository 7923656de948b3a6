"""The JSON beside the shards of a cache of encoded examples, read as what a stranger wrote."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  makes bfloat16 a type that NumPy knows by its name
import numpy as np

from dicode_jax.data.records import MAX_NAME
from dicode_jax.errors import UserError, printable
from dicode_jax.storage.files import atomic_path, read_object

KIND, VERSION = "encoded_cache", 1
MANIFEST, PLAN = "manifest.json", "encode.json"
_MAX_NAME = 2 * MAX_NAME  # that of a shard and of what lies in it


class Spec(NamedTuple):
    """Type and shape of an array that every example has; None stands for an axis that varies."""

    dtype: str
    shape: tuple[int | None, ...]


Schema = Mapping[str, Spec]


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest of a finished cache.

    Raises:
      UserError: There is none, or it is of something else.
    """
    path = folder / MANIFEST
    if not os.path.isfile(path):
        hint = (
            "; it is not finished: run train.encode again" if os.path.exists(folder / PLAN) else ""
        )
        raise UserError(f"{folder} is no cache, it has no {MANIFEST}{hint}")
    manifest = read_json(path)
    if manifest.get("format") == "dicode_jax token cache, version 1":
        with read_as(path):
            manifest = {"kind": KIND, "version": VERSION} | _from_last_release(manifest)
    if (manifest.get("kind"), manifest.get("version")) != (KIND, VERSION):
        found = f"{manifest.get('kind')!r} {manifest.get('version', '')}".strip()
        raise UserError(f"{path} is of the kind {found}, wanted {KIND!r} {VERSION}")
    with read_as(path):
        _check_manifest(manifest)
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    varying = []
    for name, spec in manifest["schema"].items():
        dtype = np.dtype(spec["dtype"])
        if dtype.hasobject or not dtype.isbuiltin or dtype.name != spec["dtype"]:
            raise TypeError(f"{name} is of the type {spec['dtype']}")
        check_counts([size for size in spec["shape"] if size is not None])
        varying += [name] * (None in spec["shape"])
    check_counts([manifest["broken"], *(manifest["lengths"][name] for name in varying)])
    for shard in manifest["shards"]:
        check_counts([shard["bytes"], shard["count"]])
        check_types(str, [shard["file"], shard["sha256"], shard["index_sha256"]])
        if pathlib.PurePath(shard["file"]).name != shard["file"]:
            raise ValueError(f"it names a file outside its folder, {shard['file']!r}")
    check_counts([manifest["count"]])
    if manifest["count"] != sum(shard["count"] for shard in manifest["shards"]):
        raise ValueError("its counts do not add up")


def _from_last_release(manifest: dict[str, Any]) -> dict[str, Any]:
    shape = (None, manifest["num_tokens"], manifest["token_dim"])
    schema = {"tokens": Spec("bfloat16", shape), "times": Spec("float64", (None,))}
    return manifest | {
        "encoder": manifest["tokenizer"],
        "data": None,
        "schema": {name: spec._asdict() for name, spec in schema.items()},
        "count": manifest["videos"],
        "lengths": dict.fromkeys(schema, manifest["keyframes"]),
        "shards": [shard | {"count": shard["videos"]} for shard in manifest["shards"]],
    }


def read_index_file(path: pathlib.Path) -> dict[str, Any]:
    """An index by its own name, whole or not."""
    found = read_json(path)
    with read_as(path):
        # The last release's know the lengths of deep tokens alone.
        lengths = found["lengths"].values() if "lengths" in found else [found["num_keyframes"]]
        for length in lengths:
            check_counts(length)
            np.asarray(length, np.int32).reshape(len(found["names"]))
        check_types(str, [*found["names"], *found["broken"].values(), found["sha256"]])
        check_counts([found["bytes"]])
        if max(map(len, found["names"]), default=0) > _MAX_NAME:
            raise ValueError(f"a name of more than {_MAX_NAME:,} letters")
        check_types(dict, [found.get("data") or {}, found["broken"]])
    return found


def check_types(kind: type, values: Iterable[Any]) -> None:
    """Raises `TypeError` unless all values are of a type."""
    for value in values:
        if type(value) is not kind:
            raise TypeError(f"want {kind.__name__}, got {printable(repr(value), 60)}")


def check_counts(values: Sequence[Any]) -> None:
    """Raises `TypeError` or `ValueError` unless all values count something."""
    check_types(int, values)
    if min(values, default=0) < 0:
        raise ValueError(f"{min(values)} is no count")


@contextlib.contextmanager
def read_as(what: str | pathlib.Path) -> Iterator[None]:
    """Tells that what is read in the block was not written here, or is damaged."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many kinds: whatever may be in the place of what is wanted
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{what} is damaged ({reason}); delete it and encode again") from error


def hash_file(path: pathlib.Path) -> str:
    """SHA-256 in hexadecimal.

    Raises:
      UserError: It is no file, or cannot be read.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; encode again")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file of a cache; raises `UserError` with the cure where there is none."""
    try:
        return read_object(path, "of a cache")
    except UserError as error:
        raise UserError(f"{error}; delete it and encode again") from error


def write_json(path: pathlib.Path, data: Mapping[str, Any]) -> None:
    """Writes such a file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
