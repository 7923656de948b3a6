"""NNX modules as safetensors: arrays named by their path, and a `config.json` beside them."""

import hashlib
import json
import os
import pathlib
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax import config as config_lib
from dicode_jax.errors import UserError, printable
from dicode_jax.kinds import CONFIG_FILE as CONFIG_FILE
from dicode_jax.nn.layer_stack import unstack, without_scan
from dicode_jax.nn.rngs import MAX_ARRAYS, blank
from dicode_jax.storage.files import atomic_path, parse_json, refuse_pointer

__all__ = [
    "hash_module",
    "load_module",
    "named_arrays",
    "not_finite",
    "read_arrays",
    "read_header",
    "read_metadata",
    "read_sources",
    "save_module",
]

WEIGHTS_FILE = "model.safetensors"
MAX_HEADER = 1 << 22  # bytes of a safetensors header; that of DiCoDe's UNet has 180,000
MAX_METADATA = 1 << 18  # letters of keys and values
Module = TypeVar("Module", bound=nnx.Module)
_OF_NO_TYPE = "is of a type not known here,"
_TYPES = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "BOOL": "bool"}


def named_arrays(module: nnx.Module | nnx.State) -> dict[str, jax.Array]:
    """Dotted path -> array of every variable of a module (or of its state)."""
    state = nnx.state(module) if isinstance(module, nnx.Module) else module
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def not_finite(arrays: Mapping[str, jax.Array | np.ndarray]) -> str | None:
    """Name and type of the first array that holds NaN or infinity, None where all are finite.

    It reads all of them once, in host memory: 0.2 to 1 s for each GB.
    """
    for name, array in arrays.items():
        # Of the shard, whose copy in host memory is not kept with the array.
        held = array.addressable_data(0) if isinstance(array, jax.Array) else array
        if not np.isfinite(np.asarray(held)).all():
            return f"{name}, {array.dtype}"
    return None


def save_module(
    folder: str | pathlib.Path,
    module: nnx.Module,
    config: Any,
    *,
    dtype=None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `model.safetensors` and `config.json` to `folder`.

    Args:
      module: Its arrays are stored under their dotted paths.
      config: The dataclass that builds the module again.
      dtype: Storage type of floating-point arrays; as they are by default.
      metadata: Where the weights come from, kept in the file's header (see `read_metadata`) and as
        notes of the config.

    Raises:
      UserError: An array holds NaN or infinity, or does so as `dtype`; nothing is written.
    """
    from safetensors.flax import save_file

    folder, arrays = pathlib.Path(folder), {}
    for path, array in named_arrays(module).items():
        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        arrays[path] = array.astype(dtype) if dtype is not None and is_float else array
    if (bad := not_finite(arrays)) is not None:
        raise UserError(
            f"nothing is written: the weights hold NaN or infinite numbers ({bad}), which no "
            "pipeline loads; their training diverged, or the storage type is too narrow for them"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(arrays, temporary, metadata={**(metadata or {}), "format": "dicode_jax"})
    write_config(folder, config, metadata)


def write_config(
    folder: str | pathlib.Path, config: Any, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes `config.json`, with the origin of the weights (see `read_metadata`) as notes."""
    notes: dict[str, Any] = dict(metadata or {})
    if sources := read_sources(notes):
        notes["sources"] = sources
    config_lib.to_json(config, pathlib.Path(folder) / CONFIG_FILE, notes=notes)


def read_arrays(
    path: str | pathlib.Path, *, on_host: bool = False
) -> Mapping[str, jax.Array | np.ndarray]:
    """Reads a safetensors file, onto the default device or `on_host` as NumPy arrays.

    Raises:
      UserError: The file is missing or is not a whole safetensors file.
    """
    from safetensors import SafetensorError, flax, numpy

    _check_header(path)
    try:
        return (numpy if on_host else flax).load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error


def read_header(path: str | os.PathLike) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict]:
    """Names, types and shapes of the arrays of a safetensors file, without reading them.

    Returns:
      Name -> (type as the format spells it, shape), and the metadata of the file.

    Raises:
      UserError: The file is missing or is not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    _check_header(path)
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            arrays = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error
    if sum(map(len, (*metadata, *metadata.values()))) > MAX_METADATA:
        raise UserError(f"{path} says more than {MAX_METADATA} letters of its origin")
    return arrays, metadata


def _check_header(path: str | os.PathLike) -> None:
    """Reads the length of the header before the header, which may claim anything."""
    if not os.path.isfile(path):
        raise UserError(f"no weights at {path}")
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    refuse_pointer(start, path)
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER:
        raise UserError(
            f"{path} is not a whole safetensors file of a module: its header has "
            f"{length} bytes, at most {MAX_HEADER} are read"
        )


def read_metadata(folder: str | pathlib.Path) -> dict[str, str]:
    """What the header of a module's weights says of their origin; empty for those trained here.

    Raises:
      UserError: The file is missing or is not a whole safetensors file.
    """
    header = read_header(pathlib.Path(folder) / WEIGHTS_FILE)[1]
    return {key: value for key, value in header.items() if key != "format"}


def read_sources(metadata: Mapping[str, str]) -> dict[str, str]:
    """File that was converted -> its SHA-256, by the metadata; empty where these say no such."""
    try:
        found = parse_json(metadata.get("sources", "{}"), "sources")
    except UserError:
        return {}
    is_such = isinstance(found, dict) and all(isinstance(x, str) for x in found.values())
    return found if is_such else {}


def load_module(
    folder: str | pathlib.Path,
    kind: Callable[..., Module],
    config_type: Any,
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    on_host: bool = False,
    skip: tuple[str, ...] = (),
) -> tuple[Module, Any]:
    """Reads what `save_module` wrote, with one array at a time in memory beside the module.

    Args:
      kind: Class of the module, or what else makes it of its config.
      config_type: The dataclass of the config, or a union of such.
      dtype: Type of computing; None for that of the parameters and inputs.
      param_dtype: Type of floating-point arrays in memory.
      on_host: Keeps the arrays as NumPy's, for models that no single device holds, and blocks that
        are stored as a stack stacked, as trainings want them. On a device each is its own, which
        is faster to generate with.
      skip: Beginnings of the names of stored arrays that `kind` has no use for; they are not read.

    Returns:
      The module and its config.

    Raises:
      UserError: A file is missing or broken; an array is missing, unknown or of the wrong shape.
    """
    folder = pathlib.Path(folder)
    config = config_lib.from_json(config_type, folder / CONFIG_FILE)
    options = {"dtype": dtype, "param_dtype": param_dtype}
    graph, abstract = nnx.split(_blank(folder, kind, config, skip=skip, **options))
    is_stacked = not on_host and without_scan(config) != config
    if is_stacked:
        config = without_scan(config)
        graph, _ = nnx.split(blank(kind, config, **options))
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(abstract)}
    state = []
    for name, _, array in _tensors(folder / WEIGHTS_FILE, skip):
        path, leaf = flat[name]
        stored_as = param_dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        for place, part in unstack(path, array) if is_stacked else [(path, array)]:
            with np.errstate(over="ignore"):  # a pipeline says which part does not fit
                part = part.astype(stored_as, copy=False)  # by jax a program for each shape
            if not on_host:  # finished before the next is read
                part = jax.block_until_ready(jax.device_put(part))
            state.append((place, leaf.replace(part)))
        del array, part
    return nnx.merge(graph, nnx.from_flat_state(state)), config


def _tensors(
    path: pathlib.Path, skip: tuple[str, ...] = ()
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, type as the format spells it, and array of a whole safetensors file, one by one."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length), path)
        header.pop("__metadata__", None)
        for name, stored in sorted(header.items()):
            if name.startswith(skip):
                continue
            if (dtype := _dtype(stored["dtype"])) is None:
                raise UserError(f"{path}: {printable(name, 120)} {_OF_NO_TYPE} {stored['dtype']}")
            try:
                array = np.empty(stored["shape"], dtype)
            except ValueError as error:
                raise UserError(
                    f"{path}: no array is like {printable(name, 120)}: {error}"
                ) from error
            file.seek(8 + length + stored["data_offsets"][0])
            file.readinto(array.reshape(-1).view(np.uint8).data)
            yield name, stored["dtype"], array
            del array  # gone before the next is there


def _dtype(kind: str) -> np.dtype | None:
    """The type of an array as the format spells it; None for one that JAX has no name for."""
    bits = kind.lstrip(string.ascii_uppercase)
    try:
        return jnp.dtype(_TYPES[kind.removesuffix(bits)] + bits)
    except (KeyError, TypeError):
        return None


def hash_module(folder: str | pathlib.Path) -> str:
    """SHA-256 of what a stored module computes: its config, and its arrays in their stored types.

    Kind, version and notes on where weights come from do not count, nor does the order of the
    arrays in the file.

    Raises:
      UserError: A file is missing or broken.
    """
    folder = pathlib.Path(folder)
    path = folder / WEIGHTS_FILE
    read_header(path)  # says what is wrong with it
    _, settings = config_lib.read_json(folder / CONFIG_FILE)
    settings.pop("kind", None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, kind, array in _tensors(path):
        digest.update(f"{name} {kind} {list(array.shape)}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check_module(
    folder: str | pathlib.Path,
    kind: Callable[..., nnx.Module],
    config_type: Any,
    *,
    skip: tuple[str, ...] = (),
) -> Any:
    """The config of a folder that `load_module` would load, by it and the weights' header alone.

    Raises:
      UserError: As `load_module` does.
    """
    folder = pathlib.Path(folder)
    config = config_lib.from_json(config_type, folder / CONFIG_FILE)
    _blank(folder, kind, config, skip=skip)
    return config


def _blank(
    folder: pathlib.Path,
    kind: Callable[..., Module],
    config: Any,
    *,
    skip: tuple[str, ...] = (),
    **options: Any,
) -> Module:
    """The module of a config without its arrays, which the header of the weights says are there.

    It is given up when it wants many more of them: a number in a config is quickly written.
    """
    path = folder / WEIGHTS_FILE
    stored = {name: x for name, x in read_header(path)[0].items() if not name.startswith(skip)}
    try:
        most = min(len(stored) + 100, MAX_ARRAYS)
        module = blank(kind, config, most=most, **options)
    except (ValueError, TypeError, ArithmeticError) as error:
        reason = printable(error, 200)
        raise UserError(f"{path} does not fit its config: {reason}") from error
    flat = nnx.to_flat_state(nnx.state(module))
    wanted = {".".join(map(str, names)): leaf.shape for names, leaf in flat}
    problems = [f"missing {name}" for name in wanted if name not in stored]
    problems += [f"unknown {printable(n, 120)}" for n in sorted(stored.keys() - wanted.keys())]
    for name in (name for name in wanted if name in stored):
        dtype, shape = stored[name]
        if shape != wanted[name]:
            problems.append(f"{name} has shape {shape}, the config wants {wanted[name]}")
        elif _dtype(dtype) is None:
            problems.append(f"{name} {_OF_NO_TYPE} {dtype}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path} does not fit its config: {'; '.join(problems[:3])}{more}")
    return module
