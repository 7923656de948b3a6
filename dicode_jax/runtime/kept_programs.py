"""Programs that a command finds again without tracing them.

jax keeps what it compiled under a key that it traces and lowers a function for, which takes Python
a second or two of every start. Here the key is what a trace is made of: the function, its static
arguments and the shapes of the others, all sources of the package, versions, jax's settings. What
it cannot see is code of others that stands in for ours; so programs are kept this way inside `use`
alone, which commands enter and the library does not. On one CPU alone: nothing else was tried.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import io
import logging
import os
import pathlib
import pickle
import platform as host
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.monitoring
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import SingleDeviceSharding

from dicode_jax import _begun
from dicode_jax.errors import UserError
from dicode_jax.runtime import compile_cache, platform
from dicode_jax.storage.files import atomic_path
from dicode_jax.typing import PyTree

__all__ = ["READ", "jit", "use"]

FOLDER = "untraced"  # beside jax's own files, which are not in folders
READ = "/dicode_jax/kept_programs/read_duration"  # an event of jax.monitoring
COMPILED = "/jax/core/compile/backend_compile_duration"  # of jax, for what it finds too
FOUND = "/jax/compilation_cache/cache_hits"
AGAIN: dict[str, str | bool] = {
    "xla_embed_ir_in_executable": False
}  # as it is; without any option jax compiles once
MOST = 2**29  # bytes of all programs
PACKAGES = ("jax", "jaxlib", "flax", "einops", "numpy")
_DIGEST = hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Use:
    depth: int = 0


_use = _Use()


@contextlib.contextmanager
def use() -> Iterator[None]:
    """Inside, what is made by `jit` keeps its programs, where jax keeps its own."""
    _use.depth += 1
    try:
        yield
    finally:
        _use.depth -= 1


def jit(function: Callable, *, static_argnames: tuple[str, ...] = (), **options: Any) -> "Program":
    """`jax.jit`, whose programs are kept inside `use`.

    A function is known by its module and name: what it closes over must follow from them. Static
    arguments are part of the key as `pickle` writes them; what it cannot write is left to jax.
    """
    return Program(function, static_argnames, options)


class Program:
    """A function of `jit`; `trace` and `lower` are those of `jax.jit`."""

    def __init__(self, function: Callable, static: tuple[str, ...], options: dict[str, Any]):
        functools.update_wrapper(self, function)
        self.__name__: str = function.__name__
        self._function, self._static = function, frozenset(static)
        names = enumerate(inspect.signature(function).parameters)
        self._places = frozenset(place for place, name in names if name in self._static)
        self._jit: Any = jax.jit(function, static_argnames=static, **options)
        self._options = sorted(options.items())
        self._found: dict[Any, jax.stages.Compiled | None] = {}
        self.trace, self.lower = self._jit.trace, self._jit.lower

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result."""
        place = compile_cache.in_use() if _use.depth else None
        if not place or "://" in place:  # nor in a bucket, which jax knows how to reach
            return self._jit(*args, **kwargs)
        static, given = [], []
        for i, value in enumerate(args):
            (static if i in self._places else given).append(value)
        rest = {}
        for name, value in sorted(kwargs.items()):
            if name in self._static:
                static.append((name, value))
            else:
                rest[name] = value
        leaves, tree = jax.tree.flatten((tuple(given), rest))
        shapes = tuple(map(_shape, leaves))
        if None in shapes:
            return self._jit(*args, **kwargs)
        known = (_surroundings(), *static, tree, shapes)
        if known not in self._found:
            trace = functools.partial(self._jit.trace, *args, **kwargs)
            self._found[known] = self._find(place, static, tree, shapes, trace)
        program = self._found[known]
        return self._jit(*args, **kwargs) if program is None else program(*given, **rest)

    def clear_cache(self) -> None:
        """Forgets what this process has, not what is kept."""
        self._found.clear()
        self._jit.clear_cache()

    def _find(self, place: str, static: list, tree: Any, shapes: tuple, trace: Callable) -> Any:
        """The program that is kept, or that is compiled and kept now; None where it cannot be."""
        try:
            what = _Key.of((self._name, self._options, static, tree, shapes))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            _log.debug("%s is not kept: %s", self._name, error)
            return None
        if (code := _code()) is None:
            return None
        folder = pathlib.Path(place) / FOLDER
        known = folder / _digest(code, _surroundings(), what)
        start = time.monotonic()
        program = _read(folder, _pointed(known), tree)
        if program is None:
            traced = trace()
            lowered = traced.lower()
            # Other sources may have said the same, which is compiled already then. What is lowered
            # has values of constants, and no word of arguments that are not used: the trace has.
            texts = traced.jaxpr, lowered.as_text(), lowered.out_info, tree, shapes
            name = _digest(_surroundings(), *(str(text).encode() for text in texts))
            program = _read(folder, name, tree)
            if program is None:
                return _compiled(lowered, folder / name, known)
            _store(known, name.encode())
        took = time.monotonic() - start
        jax.monitoring.record_event_duration_secs(READ, took, fun_name=self.__name__)
        return program

    @property
    def _name(self) -> str:
        return f"{self._function.__module__}.{self._function.__qualname__}"


@contextlib.contextmanager
def _events() -> Iterator[list[str]]:
    """A list of what jax says while it compiles, or finds what is compiled."""
    said = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        said.append(event)

    jax.monitoring.register_event_listener(listen)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield said
    finally:
        jax.monitoring.unregister_event_listener(listen)
        jax.monitoring.unregister_event_duration_listener(listen)


class _Key(pickle.Pickler):
    """Writes static arguments, the same in every process; functions and classes by their names."""

    @classmethod
    def of(cls, value: Any) -> bytes:
        """What stands for a value.

        Raises:
          pickle.PicklingError, AttributeError, TypeError: A part has no name, as a lambda.
        """
        written = io.BytesIO()
        cls(written, protocol=5).dump(value)
        return written.getvalue()

    def reducer_override(self, obj: Any) -> Any:
        """A dataclass by its fields alone, without what it has remembered."""
        if isinstance(obj, jax.tree_util.PyTreeDef):
            return str, (str(obj),)
        if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
            return type(obj), tuple(getattr(obj, f.name) for f in dataclasses.fields(obj))
        return NotImplemented


def _shape(leaf: Any) -> tuple | None:
    """What a program knows of an argument; None where it lies elsewhere than on the one CPU."""
    if isinstance(leaf, bool | int | float | complex):
        return (type(leaf).__name__,)
    if isinstance(leaf, jax.Array):
        device = jax.devices()[0]
        if device.platform != "cpu" or leaf.sharding != SingleDeviceSharding(device):
            return None
        return str(leaf.dtype), leaf.shape, getattr(leaf, "weak_type", False)
    if isinstance(leaf, np.ndarray | np.generic):
        return str(leaf.dtype), leaf.shape
    return None


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _sources() -> list[pathlib.Path]:
    return sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))


def _are_saved_since() -> bool:
    """Whether a source may be another one by now than this process runs."""
    return any(path.stat().st_mtime >= _begun.STARTED for path in _sources())


@functools.cache
def _code() -> bytes | None:
    """A digest of the package's sources; None where they are not known to be those that run."""
    digest = _digest(*(str(path).encode() + path.read_bytes() for path in _sources())).encode()
    return None if _are_saved_since() else digest


@functools.cache
def _versions() -> tuple[str, ...]:
    versions = map(importlib.metadata.version, PACKAGES)
    return host.python_version(), jax.devices()[0].client.platform_version, *versions


def _surroundings() -> bytes:
    """What a trace sees besides sources and arguments, and who compiles it."""
    settings = sorted((key, repr(value)) for key, value in jax.config.values.items())
    flags = [(key, os.environ.get(key)) for key in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    wanted = platform.platform(), platform.attention(), jax.device_count(), os.cpu_count()
    return repr((settings, flags, wanted, compile_cache.cpu(), _versions())).encode()


def _pointed(known: pathlib.Path) -> str:
    """The name of the program that these sources and arguments lead to, or that of no file."""
    with contextlib.suppress(OSError, UnicodeError):
        name = known.read_bytes().decode("ascii")
        if re.fullmatch("[0-9a-f]{64}", name):
            _touch(known)
            return name
    return "none"


def _touch(path: pathlib.Path) -> None:
    """For `_make_room`; of a folder that cannot be written, programs are read all the same."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _read(folder: pathlib.Path, name: str, tree: Any) -> jax.stages.Compiled | None:
    path = folder / name
    try:
        stored = path.read_bytes()
        digest, content = stored[:_DIGEST], stored[_DIGEST:]
        if hashlib.sha256(content).digest() != digest:  # a program with a wrong byte may crash
            raise ValueError("it is damaged")
        _touch(path)
        executable, made = pickle.loads(content)
        return serialize_executable.deserialize_and_load(executable, tree, jax.tree.structure(made))
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a broken file does: the program is compiled anew
        _log.debug("%s cannot be read: %s", path, error)
        return None


def _compiled(
    lowered: jax.stages.Lowered, path: pathlib.Path, known: pathlib.Path
) -> jax.stages.Compiled:
    """Compiles, and keeps what can be kept."""
    with _events() as said:
        program = lowered.compile()
    is_new = COMPILED in said and FOUND not in said
    try:
        stored = _written(program)
        if not is_new:
            # It may have been read, from jax's folder or earlier in this process, and XLA for CPUs
            # cannot write again what was read: functions are lost.
            with compile_cache.off():
                program = lowered.compile(AGAIN)
            stored = _written(program)
    except Exception as error:  # what jax cannot write, such as constants of arrays
        _log.debug("%s is not kept: %s", path, error)
        return program
    _store(path, stored)
    _store(known, path.name.encode())
    return program


def _written(program: jax.stages.Compiled) -> bytes:
    executable, _, made = serialize_executable.serialize(program)
    example: PyTree = jax.tree.unflatten(made, range(made.num_leaves))
    content = pickle.dumps((executable, example))
    return hashlib.sha256(content).digest() + content


def _store(path: pathlib.Path, content: bytes) -> None:
    try:
        if _are_saved_since():  # what was traced may be of older or of newer ones
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        _make_room(path)
    except (OSError, UserError) as error:  # a full disk: it is only not kept
        _log.debug("%s is not kept: %s", path, error)


def _make_room(newest: pathlib.Path) -> None:
    """Removes what was read least lately, as changes of the sources leave programs behind."""
    files = [(path, path.stat()) for path in newest.parent.iterdir() if path != newest]
    room = MOST - newest.stat().st_size
    for path, stat in sorted(files, key=lambda file: file[1].st_mtime, reverse=True):
        room -= stat.st_size
        if room < 0:
            path.unlink(missing_ok=True)
