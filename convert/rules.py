r"""The conversion engine: a table of rules from original key names to paths of an NNX state.

A converter is a table and nothing else:

    RULES = (
        Rule(r"h\.(\d+)\.mlp\.c_fc\.weight", "blocks.{0}.mlp.up.kernel"),
        Rule(r"proj_in\.weight", "proj_in.kernel", LINEAR),
        Split(r"attn\.in_proj_weight", ("q.kernel", "k.kernel", "v.kernel"), layout=LINEAR),
        Skip(r"h\.\d+\.attn\.bias", why="causal mask buffer"),
    )

It is strict both ways: a source key that no rule takes, a target that nothing fills and a shape
that does not fit are errors, and all of them are reported together. Every layout is invertible, so
the same table writes a state dict with the original names back.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Layout:
    """An invertible change of array layout: squeeze `drop` axes of size one, then transpose.

    Attributes:
      name: For reports.
      permutation: Axes of the squeezed source in target order; None keeps them.
      drop: Source axes of size one that the target does not have.
    """

    name: str
    permutation: tuple[int, ...] | None = None
    drop: tuple[int, ...] = ()

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Source layout to target layout. Raises ValueError when a dropped axis is not one wide."""
        if self.drop:
            if array.ndim <= max(self.drop) or any(array.shape[i] != 1 for i in self.drop):
                raise ValueError(f"layout {self.name} cannot take shape {tuple(array.shape)}")
            array = array.squeeze(self.drop)
        if self.permutation is None:
            return array
        if array.ndim != len(self.permutation):
            raise ValueError(f"layout {self.name} cannot take shape {tuple(array.shape)}")
        return array.transpose(self.permutation)

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """Target layout back to source layout."""
        if self.permutation is not None:
            array = array.transpose(np.argsort(self.permutation))
        return np.expand_dims(array, self.drop) if self.drop else array


KEEP = Layout("keep")
LINEAR = Layout("linear", (1, 0))  # [o, i] -> [i, o]
CONV2D = Layout("conv2d", (2, 3, 1, 0))  # [o, i, h, w] -> [h, w, i, o]
CONV1X1 = Layout("conv1x1", (1, 0), drop=(2, 3))  # [o, i, 1, 1] -> linear [i, o]
CONV1D1 = Layout("conv1d1", (1, 0), drop=(2,))  # [o, i, 1] -> linear [i, o]
CONV3D_T = Layout("conv3d_t", (2, 3, 1, 0), drop=(4,))  # [o, i, k, 1, 1] -> [k, 1, i, o]
DROP0 = Layout("drop0", drop=(0,))  # [1, ...] -> [...]
SCALAR = Layout("scalar")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One source key to one target path. `{0}`, `{1}` in `target` are the groups of `pattern`."""

    pattern: str
    target: str
    layout: Layout = KEEP


@dataclasses.dataclass(frozen=True)
class Split:
    """One source key cut in equal parts along `axis` (of the source) to several targets."""

    pattern: str
    targets: tuple[str, ...]
    axis: int = 0
    layout: Layout = KEEP


@dataclasses.dataclass(frozen=True)
class Skip:
    """Source keys that are left out on purpose, with the reason."""

    pattern: str
    why: str


Rules = Sequence[Rule | Split | Skip]


class ConversionError(ValueError):
    """Everything that did not fit, in one message."""


@dataclasses.dataclass
class Converted:
    """The outcome of a conversion.

    Attributes:
      params: Target path -> array (in the source's dtype).
      sources: Target path -> source key.
      unused: Source keys that no rule takes.
      missing: Target paths that nothing filled.
      mismatched: One line for each shape or layout that does not fit.
      skipped: Source key -> reason.
    """

    params: dict[str, np.ndarray]
    sources: dict[str, str]
    unused: list[str]
    missing: list[str]
    mismatched: list[str]
    skipped: dict[str, str]

    @property
    def problems(self) -> list[str]:
        lines = []
        for key in sorted(self.unused):
            lines.append(f"unused source key: {key}")
        for path in sorted(self.missing):
            lines.append(f"unfilled target: {path}")
        return lines + sorted(self.mismatched)

    def params_or_raise(self) -> dict[str, np.ndarray]:
        """The parameters, or a `ConversionError` that lists every problem."""
        if problems := self.problems:
            raise ConversionError(
                f"{len(problems)} problem(s) in the conversion:\n  " + "\n  ".join(problems)
            )
        return self.params


def to_numpy(array: Any) -> np.ndarray:
    """A numpy view of a numpy, JAX or torch array (torch bfloat16 goes through float32)."""
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "detach"):  # a torch tensor, without importing torch
        array = array.detach().cpu()
        return array.float().numpy() if "bfloat16" in str(array.dtype) else array.numpy()
    return np.asarray(array)


def flat_shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of an (abstract) NNX state."""
    return {path: tuple(leaf.shape) for path, leaf in flatten(state).items()}


def flatten(state: Any) -> dict[str, Any]:
    """Dotted path -> leaf of an NNX state or of a nested dictionary of arrays."""
    flat = nnx.to_flat_state(state) if isinstance(state, nnx.State) else state
    return {".".join(map(str, path)): leaf for path, leaf in flat}


def convert_state_dict(source: Mapping[str, Any], rules: Rules, *, target: Any) -> Converted:
    """Applies a table of rules.

    Args:
      source: Original key -> array (numpy, torch or `jax.ShapeDtypeStruct`-like with numpy data).
      rules: The first rule whose pattern matches the whole key takes it.
      target: NNX state (abstract or not) or a mapping of dotted path -> shape.

    Returns:
      What was converted and everything that did not fit; nothing is raised here.
    """
    shapes = (
        dict(target) if isinstance(target, Mapping) and _is_shapes(target) else flat_shapes(target)
    )
    out = Converted({}, {}, [], [], [], {})
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    for key, value in source.items():
        match, rule = _first_match(compiled, key)
        if rule is None:
            out.unused.append(key)
            continue
        if isinstance(rule, Skip):
            out.skipped[key] = rule.why
            continue
        array = to_numpy(value)
        for path, part in _parts(rule, match, array, key, out):
            _place(out, shapes, key, path, part, rule.layout)
    out.missing = [path for path in shapes if path not in out.params and path not in out.sources]
    return out


def _is_shapes(target: Mapping) -> bool:
    return all(isinstance(value, tuple) for value in target.values())


def _first_match(compiled, key):
    for pattern, rule in compiled:
        if match := pattern.fullmatch(key):
            return match, rule
    return None, None


def _parts(rule, match, array, key, out) -> Iterable[tuple[str, np.ndarray]]:
    groups = match.groups()
    if isinstance(rule, Rule):
        return [(rule.target.format(*groups), array)]
    count = len(rule.targets)
    if array.ndim <= rule.axis or array.shape[rule.axis] % count:
        out.mismatched.append(f"{key}: shape {tuple(array.shape)} cannot be cut in {count}")
        return []
    pieces = np.split(array, count, axis=rule.axis)
    return [(path.format(*groups), piece) for path, piece in zip(rule.targets, pieces, strict=True)]


def _place(out: Converted, shapes, key: str, path: str, array: np.ndarray, layout: Layout) -> None:
    if path not in shapes:
        near = difflib.get_close_matches(path, list(shapes), n=1)
        hint = f", nearest is {near[0]}" if near else ""
        out.mismatched.append(f"{key}: the model has no {path}{hint}")
        return
    if path in out.sources:
        out.mismatched.append(f"{key}: {path} is already filled by {out.sources[path]}")
        return
    out.sources[path] = key
    try:
        array = layout.forward(array)
    except ValueError as error:
        out.mismatched.append(f"{key}: {error}")
        return
    if tuple(array.shape) != shapes[path]:
        out.mismatched.append(
            f"{key}: shape {tuple(array.shape)} does not fit {path} {shapes[path]}"
        )
        return
    out.params[path] = array


def load_module(
    build: Callable[[], nnx.Module],
    source: Mapping[str, Any],
    rules: Rules,
    *,
    dtype: Any = np.float32,
) -> nnx.Module:
    """Builds a module without allocating it, then fills it from `source`.

    Args:
      build: Makes the module; it is run under `nnx.eval_shape`, so no memory is touched.
      dtype: Storage type of floating-point parameters.

    Raises:
      ConversionError: A source key is unused, a target unfilled or a shape wrong; lists all.
    """
    graph, abstract = nnx.split(nnx.eval_shape(build))
    params = convert_state_dict(source, rules, target=abstract).params_or_raise()
    return nnx.merge(graph, fill_state(abstract, params, dtype=dtype))


def fill_state(
    abstract: nnx.State, params: Mapping[str, np.ndarray], *, dtype: Any = None
) -> nnx.State:
    """Puts arrays by dotted path into an abstract state (float arrays as `dtype`)."""

    def place(path, leaf):
        array = params[".".join(map(str, path))]
        wanted = (
            dtype if dtype is not None and np.issubdtype(leaf.dtype, np.inexact) else leaf.dtype
        )
        return leaf.replace(jax.numpy.asarray(array, wanted))

    flat = nnx.to_flat_state(abstract)
    return nnx.from_flat_state([(path, place(path, leaf)) for path, leaf in flat])


def prefixed(rules: Rules, source: str, target: str = "") -> tuple[Rule | Split | Skip, ...]:
    """The same table for a part of a larger model.

    Args:
      source: Prefix of the original keys, taken literally (`"model.diffusion_model."`).
      target: Prefix of the target paths (`"unet."`).
    """
    head = re.escape(source)
    out: list[Rule | Split | Skip] = []
    for rule in rules:
        if isinstance(rule, Skip):
            out.append(dataclasses.replace(rule, pattern=head + rule.pattern))
        elif isinstance(rule, Split):
            targets = tuple(target + path for path in rule.targets)
            out.append(dataclasses.replace(rule, pattern=head + rule.pattern, targets=targets))
        else:
            out.append(
                dataclasses.replace(rule, pattern=head + rule.pattern, target=target + rule.target)
            )
    return tuple(out)
