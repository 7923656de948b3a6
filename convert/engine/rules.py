r"""Tables of a conversion: rules from original key names to paths of an NNX state.

A converter is a table and nothing else:

    RULES = (
        Rule(r"h\.(\d+)\.mlp\.c_fc\.weight", "blocks.{0}.mlp.up.kernel"),
        Rule(r"proj_in\.weight", "proj_in.kernel", LINEAR),
        Split(r"attn\.in_proj_weight", ("q.kernel", "k.kernel", "v.kernel"), layout=LINEAR),
        Skip(r"h\.\d+\.attn\.bias", why="causal mask buffer"),
    )

`convert.engine.plan` applies it, strict both ways. Every layout is invertible and every pattern of
a `Rule` is simple enough to be written out, so that the same table gives the original names back:
literals, `(...)` groups that the target names, `(?:a|b)` and `(?:a)?`, whose first form is the
name to write.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


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


def affine(source: str, target: str) -> tuple[Rule, Rule]:
    """Scale and bias of a norm."""
    return (
        Rule(rf"{source}\.weight", f"{target}.scale"),
        Rule(rf"{source}\.bias", f"{target}.bias"),
    )


def dense(source: str, target: str, layout: Layout = LINEAR) -> tuple[Rule, Rule]:
    """Kernel and bias of a linear layer or a convolution."""
    return (
        Rule(rf"{source}\.weight", f"{target}.kernel", layout),
        Rule(rf"{source}\.bias", f"{target}.bias"),
    )


class ConversionError(ValueError):
    """Everything that did not fit, in one message.

    Attributes:
      problems: One line each, sorted.
    """

    def __init__(self, problems: Sequence[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        head = f"{len(self.problems)} problem(s) in the conversion:\n  "
        super().__init__(head + "\n  ".join(self.problems))


def to_numpy(array: Any) -> np.ndarray:
    """A numpy view of a numpy array, a tensor of a `Source` or a torch tensor (bfloat16 too)."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        # Numpy has no bfloat16 of its own; float32 holds it exactly.
        return array.float().numpy() if "bfloat16" in str(array.dtype) else array.numpy()
    return array.numpy() if hasattr(array, "numpy") else np.asarray(array)


def prefixed(rules: Rules, source: str, target: str = "") -> tuple[Rule | Split | Skip, ...]:
    """The same table for a part of a larger model.

    Args:
      source: Prefix of the original keys, taken literally (`"model.diffusion_model."`).
      target: Prefix of the target paths (`"unet."`).
    """
    head = re.escape(source)
    out: list[Rule | Split | Skip] = []
    for rule in rules:
        pattern = head + rule.pattern
        if isinstance(rule, Skip):
            out.append(dataclasses.replace(rule, pattern=pattern))
        elif isinstance(rule, Split):
            targets = tuple(target + path for path in rule.targets)
            out.append(dataclasses.replace(rule, pattern=pattern, targets=targets))
        else:
            out.append(dataclasses.replace(rule, pattern=pattern, target=target + rule.target))
    return tuple(out)


def defaulted(options: Mapping[str, Any], table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Our fields by a table: original option -> our field, and the original's default."""
    return {ours: options.get(name, default) for name, (ours, default) in table.items()}


def original_names(rules: Rules, path: str) -> Iterator[tuple[str, Rule | Split]]:
    """Source keys that the table would put at a target path, the one to write first.

    Raises:
      ValueError: The pattern of a rule for this path cannot be written out.
    """
    for rule in rules:
        if isinstance(rule, Skip):
            continue
        for target in rule.targets if isinstance(rule, Split) else (rule.target,):
            if (match := _template(target).fullmatch(path)) is None:
                continue
            groups = {int(name[1:]): value for name, value in match.groupdict().items()}
            for key in _written_out(rule.pattern, groups):
                found = re.fullmatch(rule.pattern, key)
                if found and target.format(*found.groups()) == path:
                    yield key, rule


def piece_of(rule: Rule | Split, path: str) -> tuple[int, int]:
    """Which piece of a rule's source a target path is, and of how many."""
    if isinstance(rule, Rule):
        return 0, 1
    fits = [_template(target).fullmatch(path) is not None for target in rule.targets]
    return fits.index(True), len(fits)


@functools.cache
def _template(target: str) -> re.Pattern:
    """`a.{0}.b.{1}` as a pattern with the groups `g0` and `g1`."""
    out, seen = "", set()
    for text, number in itertools.zip_longest(*[iter(re.split(r"\{(\d+)\}", target))] * 2):
        out += re.escape(text)
        if number is not None:
            out += f"(?P=g{number})" if number in seen else rf"(?P<g{number}>[^.]+)"
            seen.add(number)
    return re.compile(out)


def _written_out(pattern: str, groups: dict[int, str]) -> list[str]:
    """Every string of a simple pattern (see the module's text) with its groups filled in."""
    strings, count = [""], 0
    tokens = re.compile(
        r"\\([^\w])|\(\?:([^()]*)\)(\??)|\(([^?()][^()]*)\)|([^\\()\[\]{}.*+?|^$])", re.DOTALL
    )
    at = 0
    while at < len(pattern):
        match = tokens.match(pattern, at)
        if match is None:
            raise ValueError(f"pattern {pattern!r} cannot be written out from {pattern[at:]!r}")
        literal, choices, optional, group, plain = match.groups()
        if choices is not None:
            ends = [s for choice in choices.split("|") for s in _written_out(choice, {})]
            ends += [""] if optional else []
        elif group is not None:
            ends = [groups[count]] if count in groups else group.split("|")
            count += 1
        else:
            ends = [literal or plain]
        strings = [start + end for start in strings for end in ends]
        at = match.end()
    return strings
