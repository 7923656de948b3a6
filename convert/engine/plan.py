"""The conversion engine: a table of rules, applied by shapes first and by values tensor by tensor.

It is strict both ways: a source key that no rule takes, a target that nothing fills and a shape or
dtype that does not fit are errors, and all of them are found before any weight is read.
"""

import dataclasses
import difflib
import json
import math
import pathlib
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from tqdm import tqdm

from convert.engine.rules import (
    ConversionError,
    Layout,
    Rules,
    Skip,
    Split,
    original_names,
    prefixed,
    to_numpy,
)
from dicode_jax.errors import UserError
from dicode_jax.nn.rngs import blank
from dicode_jax.storage.files import atomic_path
from dicode_jax.storage.weights import WEIGHTS_FILE, write_config

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_CODES = _FLOATS | {"int64": "I64"}
NAMED = 50  # problems that get a nearest name: looking for it takes a while


@dataclasses.dataclass(frozen=True)
class Part:
    """Where a target, or one layer of a stacked target, comes from.

    Attributes:
      key: Source key.
      layout: From the source's layout to the target's.
      cut: `(axis, index, count)` of the piece of the source, None for the whole.
    """

    key: str
    layout: Layout
    cut: tuple[int, int, int] | None = None

    def read(self, source: Mapping[str, Any]) -> np.ndarray:
        """The values, in the source's dtype and the target's layout."""
        return self.arrange(to_numpy(source[self.key]))

    def arrange(self, array: np.ndarray) -> np.ndarray:
        """The piece in the target's layout. Raises ValueError when it has another shape."""
        if self.cut is not None:
            axis, index, count = self.cut
            if array.ndim <= axis or array.shape[axis] % count:
                raise ValueError(f"shape {tuple(array.shape)} cannot be cut in {count}")
            array = np.split(array, count, axis=axis)[index]
        return self.layout.forward(array)


@dataclasses.dataclass
class Plan:
    """What goes where, and everything that does not fit.

    Attributes:
      source: Original key -> tensor, of which only `shape` and `dtype` have been looked at.
      blank: The module to fill, without memory; None when only shapes were given.
      shapes: Target path -> shape.
      parts: Target path -> its one part; one for each layer where the target is stacked.
      stacked: Target paths whose parts are layers along a new first axis.
      skipped: Source key -> reason.
      unused: Source keys that no rule takes.
      missing: Target paths that nothing (or, where stacked, not every layer) fills.
      mismatched: One line for each shape, dtype or layout that does not fit.
      problems: One line each, sorted, with the nearest names.
    """

    source: Mapping[str, Any]
    blank: nnx.Module | None
    shapes: dict[str, tuple[int, ...]]
    parts: dict[str, tuple[Part, ...]]
    stacked: frozenset[str]
    skipped: dict[str, str]
    unused: list[str]
    missing: list[str]
    mismatched: list[str]
    problems: list[str]

    def check(self) -> "Plan":
        """The plan itself. Raises ConversionError, which lists every problem, if there is one."""
        if self.problems:
            raise ConversionError(self.problems)
        return self

    @property
    def sources(self) -> dict[str, str]:
        """Target path -> source key, for targets with one part."""
        return {path: parts[0].key for path, parts in self.parts.items() if len(parts) == 1}

    def layers(self, path: str) -> Iterator[np.ndarray]:
        """The parts of a target one after another, each read when it is asked for."""
        return (part.read(self.source) for part in self.parts[path])

    def array(self, path: str) -> np.ndarray:
        """The whole target in the source's dtype."""
        layers = list(self.layers(path))
        return np.stack(layers) if path in self.stacked else layers[0]

    def module(self) -> nnx.Module:
        """The module with the values that `write_module` would store, float32.

        Raises:
          ConversionError: The plan has problems.
          UserError: A weight is NaN or infinite.
        """
        return fill(self.check().blank, self)

    def report(self) -> dict[str, Any]:
        """What was decided, ready for JSON: counts, skipped keys with reasons, problems."""
        used = {part.key for parts in self.parts.values() for part in parts}
        return {
            "source_keys": len(self.source),
            "used": len(used),
            "skipped": dict(sorted(self.skipped.items())),
            "targets": len(self.shapes),
            "parameters": sum(math.prod(shape) for shape in self.shapes.values()),
            "problems": self.problems,
        }


def flatten(state: Any) -> dict[str, Any]:
    """Dotted path -> leaf of an NNX state."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def flat_shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of an (abstract) NNX state."""
    return {path: tuple(leaf.shape) for path, leaf in flatten(state).items()}


def select(source: Mapping[str, Any], *prefixes: str) -> dict[str, Any]:
    """The keys that begin with one of the prefixes."""
    return {key: value for key, value in source.items() if key.startswith(prefixes)}


def below(source: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The keys below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in source.items() if k.startswith(prefix)}


def stray_keys(source: Mapping[str, Any], prefixes: Iterable[str], names: Iterable[str]) -> list:
    """One line for every key that is not one of `names` and not below a prefix."""
    stray = [k for k in source if not k.startswith(tuple(prefixes)) and k not in set(names)]
    return [f"unused source key: {key}" for key in sorted(stray)]


def plan(
    source: Mapping[str, Any],
    rules: Rules,
    target: nnx.Module | nnx.State | Mapping[str, tuple[int, ...]],
    *,
    stacked: Sequence[str] = (),
) -> Plan:
    """Decides by shapes alone what goes where.

    Args:
      source: Original key -> anything with `shape` and `dtype`.
      rules: The first rule whose pattern matches the whole key takes it.
      target: The module to fill (see `blank`), its state, or dotted path -> shape.
      stacked: Target prefixes (`"body.blocks"`) below which the parameters of all layers lie along
        a first axis, while the rules name one layer (`body.blocks.3.attn...`).

    Returns:
      The plan with its problems; nothing is raised here.
    """
    is_module = isinstance(target, nnx.Module)
    state = nnx.state(target) if is_module else target
    shapes = flat_shapes(state) if isinstance(state, nnx.State) else dict(state)
    single = _layer_shapes(shapes, stacked)
    found: dict[str, Part] = {}
    skipped, unused, mismatched = {}, [], []
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    for key, value in source.items():
        match, rule = _first_match(compiled, key)
        if rule is None:
            unused.append(key)
        elif isinstance(rule, Skip):
            skipped[key] = rule.why
        else:
            for path, part in _parts(rule, match, key):
                line = _misfit(path, part, value, single, found, len(mismatched) < NAMED)
                found.setdefault(path, part)
                if line is not None:
                    mismatched.append(f"{key}: {line}")
    absent = [path for path in single if path not in found]
    parts = {
        path: tuple(found[name] for name in names if name in found)
        for path, names in by_target(shapes, stacked).items()
    }
    return Plan(
        source=source,
        blank=target if is_module else None,
        shapes=shapes,
        parts=parts,
        stacked=frozenset(p for p in shapes if _stack_of(p, stacked) is not None),
        skipped=skipped,
        unused=sorted(unused),
        missing=sorted(absent),
        mismatched=sorted(mismatched),
        problems=_problems(rules, unused, absent, mismatched),
    )


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of module that original weights fill; `convert.from_torch` calls it.

    Attributes:
      build: Makes the module, see `dicode_jax.nn.rngs.blank`.
      config: Class of the configuration that `build` takes.
      read: An original configuration -> one of that class.
      rules: The table for a state dict (without prefix) and a configuration.
      check: One line for each fault of the values, looked for when the shapes fit.
    """

    build: Callable[..., nnx.Module]
    config: type
    read: Callable[[Any], Any]
    rules: Callable[[Mapping[str, Any], Any], Rules]
    check: Callable[[Mapping[str, Any], Any], Sequence[str]] = lambda source, cfg: ()

    def plan(self, source: Mapping[str, Any], cfg: Any, prefix: str = "") -> Plan:
        """What goes where, by shapes alone; keys that are not below the prefix are left alone."""
        rules = prefixed(self.rules(below(source, prefix), cfg), prefix)
        own = select(source, prefix)
        return plan(own, rules, blank(self.build, cfg), stacked=stacked_blocks(cfg))

    def __call__(self, state_dict: Mapping[str, Any], config: Any) -> nnx.Module:
        """The module from an original state dict; see `convert.from_torch`."""
        cfg = config if isinstance(config, self.config) else self.read(config)
        made = self.plan(state_dict, cfg)
        if lines := made.problems or self.check(state_dict, cfg):
            raise ConversionError(lines)
        return made.module()


def stacked_blocks(cfg: Any) -> tuple[str, ...]:
    """The prefixes of blocks in a module whose layers are stacked, for `plan`."""
    if hasattr(cfg, "stacks"):
        return cfg.stacks
    body = getattr(cfg, "body", cfg)
    name = "blocks" if body is cfg else "body.blocks"
    return (name,) if getattr(body, "scan_layers", False) else ()


def _stack_of(path: str, stacked: Sequence[str]) -> str | None:
    return next((prefix for prefix in stacked if path.startswith(prefix + ".")), None)


def by_target(shapes: Mapping[str, tuple], stacked: Sequence[str]) -> dict[str, list[str]]:
    """Target path -> the paths that rules give its layers (itself, where it is not stacked)."""
    out = {}
    for path, shape in shapes.items():
        prefix = _stack_of(path, stacked)
        rest = path if prefix is None else path.removeprefix(prefix)
        out[path] = [path] if prefix is None else [f"{prefix}.{i}{rest}" for i in range(shape[0])]
    return out


def _layer_shapes(shapes: Mapping[str, tuple], stacked: Sequence[str]) -> dict[str, tuple]:
    """Shapes under the paths that rules give."""
    out = {}
    for path, names in by_target(shapes, stacked).items():
        out |= dict.fromkeys(names, shapes[path] if names == [path] else shapes[path][1:])
    return out


def _first_match(compiled, key):
    for pattern, rule in compiled:
        if match := pattern.fullmatch(key):
            return match, rule
    return None, None


def _parts(rule, match, key) -> list[tuple[str, Part]]:
    groups = match.groups()
    if not isinstance(rule, Split):
        return [(rule.target.format(*groups), Part(key, rule.layout))]
    count = len(rule.targets)
    return [
        (path.format(*groups), Part(key, rule.layout, (rule.axis, i, count)))
        for i, path in enumerate(rule.targets)
    ]


def _misfit(path: str, part: Part, value: Any, shapes, found, name_near: bool) -> str | None:
    """Why a part cannot go to a path, or None."""
    if path not in shapes:
        near = difflib.get_close_matches(path, list(shapes), n=1) if name_near else []
        return f"the model has no {path}" + (f", nearest is {near[0]}" if near else "")
    if path in found:
        return f"{path} is already filled by {found[path].key}"
    name = str(value.dtype).split(".")[-1]
    if not name.startswith(("float", "bfloat")):
        return f"dtype {name} does not fit {path}, which holds floating-point numbers"
    shape = tuple(value.shape)
    try:
        got = part.arrange(np.broadcast_to(np.uint8(0), shape)).shape
    except ValueError as error:
        return str(error)
    return None if got == shapes[path] else f"shape {shape} does not fit {path} {shapes[path]}"


def _problems(rules: Rules, unused, missing, mismatched) -> list[str]:
    """All problems as lines, with the nearest candidate where there is one."""
    wanted = {path: next(original_names(rules, path), ("?", None))[0] for path in missing}
    lines = []
    for i, key in enumerate(sorted(unused)):
        near = difflib.get_close_matches(key, list(wanted.values()), n=1) if i < NAMED else []
        lines.append(
            f"unused source key: {key}" + (f" (nearest missing: {near[0]})" if near else "")
        )
    for i, path in enumerate(sorted(missing)):
        near = difflib.get_close_matches(wanted[path], list(unused), n=1) if i < NAMED else []
        hint = f", nearest unused: {near[0]}" if near else ""
        lines.append(f"unfilled target: {path} (from {wanted[path]}{hint})")
    return lines + sorted(mismatched)


def fill(module: nnx.Module, plan: Plan, prefix: str = "") -> nnx.Module:
    """A module like this one with the planned weights below a prefix, float32.

    Raises:
      UserError: A weight is NaN or infinite.
    """
    graph, state = nnx.split(module)

    def read(path: tuple) -> jax.Array:
        name = prefix + ".".join(map(str, path))
        return jax.numpy.asarray(finite(name, plan.array(name), DTYPES["float32"]))

    flat = [(path, leaf.replace(read(path))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def write_module(
    folder: str | pathlib.Path,
    plan: Plan,
    config: Any,
    *,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
    progress: bool = True,
) -> None:
    """Writes what `dicode_jax.storage.weights.load_module` reads, one tensor in memory at a time.

    Args:
      folder: Made if need be; gets `model.safetensors` and `config.json`.
      config: The dataclass that builds the module.
      dtype: Storage type, one of `DTYPES`.
      metadata: Origin, converter and hashes for the file's header and the config's notes
        (`command.metadata`).
      progress: Show a bar with bytes.

    Raises:
      ConversionError: The plan has problems.
      UserError: A weight is NaN or infinite (as stored, or in `dtype`), or the disk is full.
    """
    plan.check()
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = DTYPES[dtype]
    arrays = {
        path: (shape, kind, lambda path=path: plan.layers(path))
        for path, shape in plan.shapes.items()
    }
    header = {**(metadata or {}), "format": "dicode_jax"}
    write_safetensors(folder / WEIGHTS_FILE, arrays, metadata=header, progress=progress)
    write_config(folder, config, metadata)


Pieces = Callable[[], Iterable[np.ndarray]]


def write_safetensors(
    path: pathlib.Path,
    arrays: Mapping[str, tuple[tuple[int, ...], np.dtype, Pieces]],
    *,
    metadata: Mapping[str, str],
    progress: bool = True,
) -> None:
    """Streams floating-point arrays into a safetensors file that appears when it is whole.

    Args:
      arrays: Name -> shape, dtype to store, and a function that gives the values in pieces along
        the first axis; written in this order, but the wider types first, which keeps all aligned.

    Raises:
      UserError: A number is NaN or infinite, or becomes so when it is stored, or the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ordered = sorted(arrays.items(), key=lambda item: -item[1][1].itemsize)
    end = 0
    for name, (shape, dtype, _) in ordered:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        code = _CODES[dtype.name]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    bar = tqdm(
        total=end,
        unit="B",
        unit_scale=True,
        desc=f"writing {path.parent.name}",
        disable=None if progress else True,
    )
    with atomic_path(path) as temporary, temporary.open("wb") as file, bar:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, (_, dtype, pieces) in ordered:
            for piece in pieces():
                values = finite(name, piece, dtype)
                file.write(values.reshape(-1).view(np.uint8))
                bar.update(values.nbytes)


def finite(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array as contiguous `dtype`.

    Raises:
      UserError: It holds NaN or infinity, or does so in `dtype`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.asarray(array, dtype, order="C")  # keeps a scalar a scalar
    if np.isfinite(values).all():
        return values
    if np.isfinite(array).all():
        raise UserError(f"{name} has numbers too large for {dtype.name}; use another --dtype")
    raise UserError(f"{name} holds NaN or infinite numbers: the weights are broken")
