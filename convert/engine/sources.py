"""Checkpoints as lazy mappings: safetensors, sharded folders and torch files, read safely.

Opening one reads names, shapes and dtypes; values are read when they are asked for. Torch files are
pickles, so they are checked before torch reads them (a plain, uncompressed zip archive whose sizes
add up, and see `convert.engine.pickles`) and then opened with `weights_only=True`, which runs no
code of the file. Safetensors need no torch.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from convert.engine import archives, pickles
from dicode_jax.errors import UserError, printable
from dicode_jax.storage.files import read_object, refuse_pointer

TORCH_SUFFIXES = (".bin", ".pt", ".ckpt", ".pth")
SINGLE_FILES = (
    *("model.safetensors", "pytorch_model.bin"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),  # of diffusers
)
INDEX_FILES = tuple(f"{name}.index.json" for name in SINGLE_FILES)
WRAPPERS = ("state_dict", "module", "model", "model_state_dict")
PREFIXES = ("_forward_module.", "module.")
# Parts of a key that say how a model ran: torch.compile, FSDP, recomputation.
RUNNERS = re.compile(r"(?<![^.])_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
AVERAGES = ("model_ema", "ema", "ema_state_dict", "params_ema")
# What an index may name although no shard holds it: the same array as the token table.
TIED = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

_MIN_TORCH = (2, 10)  # earlier ones could be made to run code in spite of weights_only
_CUT = 100  # characters of what may be of any length, in errors
_MAX_NAME = 300  # characters of a key; the longest of a model is half as long
_MAX_HEADER = 1 << 24  # bytes; 100 for each tensor
_MAX_WRAPPERS = 8  # mappings around the weights, each in the next
_MAX_SHARED = 8  # how many times as much as a file holds its tensors may be together, by sharing
_REOPEN = 1 << 28  # bytes read from a memory map before it is renewed, which frees its pages
_BLOCK = 1 << 22
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is asked for.

    Attributes:
      shape: Its shape.
      dtype: Numpy's, or bfloat16 of ml_dtypes.
      read: Reads it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    def numpy(self) -> np.ndarray:
        """The values, a fresh array. Raises UserError when they cannot be read any more."""
        return self.read()


class Source(Mapping[str, LazyTensor]):
    """The tensors of a checkpoint under their keys, wrappers taken off.

    Attributes:
      files: The files that hold them.
      left_out: What stood beside the tensors (`optimizer_states`, ...) -> why it is not read.
    """

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        files: tuple[pathlib.Path, ...] = (),
        left_out: Mapping[str, str] | None = None,
    ):
        self._tensors, self.files, self.left_out = dict(tensors), files, dict(left_out or {})

    def __getitem__(self, key: str) -> LazyTensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def sha256(self, *, progress: bool = True) -> dict[str, str]:
        """File name -> SHA-256, reading every file once; the checksums in zip archives are checked.

        Raises:
          UserError: A file is damaged or cannot be read.
        """
        total = sum(path.stat().st_size for path in self.files)
        with tqdm(total=total, unit="B", unit_scale=True, desc="checking files",
                  disable=None if progress else True) as bar:  # fmt: skip
            return {path.name: _hash(path, bar) for path in self.files}


def open_source(path: str | os.PathLike) -> Source:
    """Opens a checkpoint: a safetensors or torch file, or a folder with one or with shards.

    Of a folder with safetensors and torch files those are read, as they hold the same.

    Raises:
      UserError: There is none, or it is damaged, unsafe or no state dict.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}")
    if not path.is_file():
        raise UserError(f"{path} is a pipe or a device, not a checkpoint")
    _check_pointer(path)
    if path.suffix == ".safetensors":
        tensors, left_out = _open_safetensors(path), {}
    elif path.suffix in TORCH_SUFFIXES:
        tensors, left_out = _open_torch(path)
    else:
        raise UserError(
            f"{path} is neither .safetensors nor a torch file ({', '.join(TORCH_SUFFIXES)})"
        )
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    _check_names(path, tensors)
    tensors = _without_prefixes(path, tensors)
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith("model_ema.")}
    if 0 < len(rest) < len(tensors):  # Lightning's, beside the weights
        tensors = rest
        left_out |= {"model_ema.*": _AVERAGE}
    if any(".lora_A." in key for key in tensors):
        raise UserError(f"{path} is {_ADAPTER}")
    return Source(tensors, (path,), left_out)


_AVERAGE = "a running average beside the weights, which are read"
_ADAPTER = (
    "a PEFT adapter, not a model: load it with its base in peft, and save what "
    "merge_and_unload() gives"
)


def _check_names(path: pathlib.Path, names: Iterable[str]) -> None:
    """Refuses what no weight is called: names go into many lines of a report, and of errors."""
    for name in names:
        if len(name) > _MAX_NAME:
            raise UserError(
                f"{path} holds a name of {len(name)} characters, which no weight has: "
                f"{name[:_CUT]}..."
            )


def _check_pointer(path: pathlib.Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(40)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    refuse_pointer(start, path)


def _open_folder(folder: pathlib.Path) -> Source:
    for name in INDEX_FILES:
        if (folder / name).is_file():
            return _open_shards(folder / name)
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return open_source(folder / name)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds {_ADAPTER}")
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):  # as the authors of a model name it
        found = sorted(p for p in folder.iterdir() if p.suffix in suffixes and p.is_file())
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UserError(f"{folder} holds several checkpoints: give one of {names} alone")
        if found:
            return open_source(found[0])
    raise UserError(
        f"no checkpoint in {folder}: want one of {', '.join(SINGLE_FILES)}, or the index of one, "
        "or one alone"
    )


def _open_shards(index: pathlib.Path) -> Source:
    """All shards of an index; what the index says and what the shards hold must agree."""
    places = read_object(index, "an index of shards").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} is not an index of shards: it has no weight_map of file names")
    names = sorted(set(places.values()))
    if bad := [name for name in names if pathlib.PurePath(name).name != name or name == ".."]:
        raise UserError(f"{index} names a file outside its folder: {bad[0][:_CUT]!r}")
    if bad := [name for name in names if not name.endswith((".safetensors", *TORCH_SUFFIXES))]:
        raise UserError(f"{index} names {bad[0][:_CUT]!r}, which is no checkpoint")
    _check_names(index, places)
    places = _without_prefixes(index, places)
    tensors, files, left_out = {}, [], {}
    for name in names:
        shard = open_source(index.parent / name)
        for key in shard:
            if places.get(key) != name:
                raise UserError(f"{index} and {name} disagree about {key}")
        tensors |= shard
        files += shard.files
        left_out |= shard.left_out
    absent = sorted(set(places) - set(tensors))
    left_out |= {
        key: f"named by {index.name} and in no shard: tied" for key in absent if key in TIED
    }
    if absent := [key for key in absent if key not in TIED]:
        raise UserError(
            f"{index}: {absent[0]} is not in {places[absent[0]]} ({len(absent)} absent)"
        )
    return Source(tensors, (index, *files), left_out)


def _open_safetensors(path: pathlib.Path) -> dict[str, LazyTensor]:
    import safetensors

    def reopen():
        return safetensors.safe_open(path, framework="numpy")

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:  # the library takes six times as much, and gigabytes for it
            raise ValueError(f"it claims {length} bytes for the names of its tensors")
        with reopen() as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            kinds = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {_line(error)}") from error
    file = _Renewed(path, reopen)
    out = {}
    for key, (shape, kind) in kinds.items():
        dtype = _dtype(path, key, kind)
        read = lambda key=key, d=dtype: file.read(lambda f: _typed(f.get_tensor(key), d))  # noqa: E731
        out[key] = LazyTensor(shape, dtype, read)
    return out


def _typed(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array as `dtype`, where a release of safetensors gives bfloat16 as plain bytes."""
    return array if array.dtype == dtype else array.view(dtype)


def _open_torch(path: pathlib.Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    torch = _torch()
    archives.check(path)
    _check_pickle(torch, path)
    content, route = _bare(_load_torch(torch, path)), ()
    left_out = {}
    while isinstance(content, dict) and (name := _wrapper(content)):
        beside = f"beside the weights in {path.name}, no weights itself"
        rest = [_label(key) for key in content if key != name]
        left_out |= {key: _AVERAGE if key in AVERAGES else beside for key in rest}
        content, route = _bare(content[name]), (*route, name)
        if len(route) > _MAX_WRAPPERS:
            raise UserError(f"{path} is no state dict: {'.'.join(route)} goes on and on")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")

    def reopen():
        tensors = _load_torch(torch, path)
        for name in route:
            tensors = tensors[name]
        return tensors

    file = _Renewed(path, reopen)
    out, total = {}, 0
    for key, tensor in content.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise UserError(f"{path} is no state dict: {_label(key)!r} is a {kind}, not a tensor")
        tensor = torch.Tensor.detach(tensor)  # without attributes, as in _bare
        dtype = _plain_dtype(torch, path, key, tensor)
        total += tensor.numel() * dtype.itemsize
        read = lambda key=key: file.read(lambda tensors: _from_torch(torch, tensors[key]))  # noqa: E731
        out[key] = LazyTensor(tuple(tensor.shape), dtype, read)
    if total > _MAX_SHARED * path.stat().st_size:
        raise UserError(f"{path} claims {total} bytes of tensors, more than is stored: refused")
    return out, left_out


def _bare(content: Any) -> Any:
    """A mapping without the attributes of a pickle, which could stand in the place of methods."""
    return dict(dict.items(content)) if isinstance(content, dict) else content


def _label(key: Any) -> str:
    """A key of a pickle, which may be anything."""
    if isinstance(key, str):
        return printable(key[:_CUT])
    return str(key) if isinstance(key, int) else f"a {type(key).__name__}"


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "torch files need PyTorch 2.10 or later: pip install 'dicode-jax[convert]'"
        ) from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _MIN_TORCH:
        raise UserError(
            f"PyTorch {torch.__version__} cannot read torch files safely; install 2.10 or later"
        )
    return torch


def _check_pickle(torch: Any, path: pathlib.Path) -> None:
    """Looks through the pickle as torch finds it in the archive, before it is run."""
    try:
        pickles.check(torch._C.PyTorchFileReader(os.fspath(path)).get_record("data.pkl"))
    except pickles.WantsCode as error:
        raise _wants_code(path, str(error)) from error
    except Exception as error:  # of torch's archive reader, whatever it is
        raise UserError(f"{path} is damaged or no state dict: {_line(error)}") from error


def _wants_code(path: pathlib.Path, name: str) -> UserError:
    name = name[:_CUT]
    return UserError(f"{path} wants to run code ({name}), which weights never need: refused")


def _load_torch(torch: Any, path: pathlib.Path) -> Any:
    """What a file holds, its tensors in a memory map."""
    numpy = [(pickles.NumpyValue, name) for name in (*pickles.NUMPY, *pickles.NUMPY_TYPES)]
    try:
        with torch.serialization.safe_globals(numpy):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a hostile pickle can raise anything
        text = str(error)
        if "Unsupported global" in text or "GLOBAL" in text:
            wanted = text.split("GLOBAL ", 1)[-1].split(" ", 1)[0]
            raise _wants_code(path, wanted) from error
        text = text.split("WeightsUnpickler error:")[-1].split("This file can still")[0]
        raise UserError(f"{path} is damaged or no state dict: {_line(text or error)}") from error


def _wrapper(content: Mapping) -> str | None:
    return next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)


def _plain_dtype(torch: Any, path: pathlib.Path, key: str, tensor: Any) -> np.dtype:
    """The dtype of an ordinary tensor whose storage holds every one of its numbers."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise UserError(f"{path}: {key[:_CUT]} is a sparse, quantised or otherwise unusual tensor")
    dtype = _dtype(path, key, _TORCH_DTYPES.get(str(tensor.dtype).removeprefix("torch."), "?"))
    if tensor.numel() * dtype.itemsize > tensor.untyped_storage().nbytes():
        raise UserError(
            f"{path}: {key[:_CUT]} claims {tuple(tensor.shape)}, more than is stored: refused"
        )
    return dtype


def _dtype(path: pathlib.Path, key: str, kind: str) -> np.dtype:
    if kind not in _DTYPES:
        raise UserError(f"{path}: {key[:_CUT]} has a dtype that is not supported ({kind})")
    return np.dtype(_DTYPES[kind])


def _from_torch(torch: Any, tensor: Any) -> np.ndarray:
    """A copy that does not hold on to the memory map."""
    tensor = torch.Tensor.detach(tensor)
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


class _Renewed:
    """A memory-mapped file that is opened afresh from time to time, so that its pages are freed."""

    def __init__(self, path: pathlib.Path, reopen: Callable[[], Any]):
        self._path, self._reopen = path, reopen
        self._file, self._read = None, 0

    def read(self, get: Callable[[Any], np.ndarray]) -> np.ndarray:
        try:
            if self._file is None:
                self._file = self._reopen()
            array = get(self._file)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self._path} cannot be read any more: {_line(error)}") from error
        self._read += array.nbytes
        if self._read > _REOPEN:
            self._file, self._read = None, 0
        return array


def _without_prefixes(path: pathlib.Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Takes off what trainers put before every key, in any order, and what runners put inside."""
    bare = {key: RUNNERS.sub("", key) for key in tensors}
    while prefix := next((p for p in PREFIXES if any(k.startswith(p) for k in bare.values())), ""):
        if stray := [key for key, name in bare.items() if not name.startswith(prefix)]:
            raise UserError(f"{path}: some keys start with {prefix} and some do not ({stray[0]})")
        bare = {key: RUNNERS.sub("", name.removeprefix(prefix)) for key, name in bare.items()}
    if len(set(bare.values())) < len(bare):
        raise UserError(f"{path} holds the same weights under several prefixes")
    return {bare[key]: value for key, value in tensors.items()}


def _hash(path: pathlib.Path, bar: tqdm) -> str:
    """SHA-256 of a file; of a torch file the checksum of every entry is compared on the way."""
    digest = hashlib.sha256()
    spans = archives.spans(path) if path.suffix in TORCH_SUFFIXES else []
    try:
        with path.open("rb") as file:
            for start, size, name, wanted in spans:
                _feed(file, start - file.tell(), digest, bar)
                if _feed(file, size, digest, bar) != wanted:
                    raise UserError(f"{path} is damaged: the checksum of {name} is wrong")
            _feed(file, path.stat().st_size - file.tell(), digest, bar)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def _feed(file, count: int, digest, bar: tqdm) -> int:
    """Hashes the next bytes of a file and gives their CRC-32."""
    crc = 0
    while count > 0 and (block := file.read(min(count, _BLOCK))):
        digest.update(block)
        crc = zlib.crc32(block, crc)
        count -= len(block)
        bar.update(len(block))
    return crc


def _line(error: BaseException | str) -> str:
    """The message of an exception on one line, cut to a readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
