"""Finds golden fixtures, runs the runner of their kind and compares every array.

Fixtures lie in folders, one for each family. One is an `.npz` file whose `meta` names its kind, or
a folder whose name is its kind. A runner takes a `Fixture` and yields a `Check` for each array; it
reads sizes, cases and key lists from the fixture, so other fixtures of the same kind run through
the same code. A case whose config asks for an option that is gone is left out by name, with the
option. Which families there are is what the runners say: a fixture of another family is left
out by name, one of theirs that no runner takes is a failure.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

ALIASES = {"ardiffusion": "ar_diffusion"}  # how a folder of fixtures calls a family of ours
VOCABULARIES: str | None = None  # folder of published tokenizer files, from the command line

RUNNERS: dict[str, Callable[["Fixture"], Iterable["Check | LeftOut"]]] = {}


def runner(*kinds: str):
    """Registers a function as the runner of fixtures of these kinds, `family/kind`."""

    def register(function):
        for kind in kinds:
            if kind in RUNNERS:
                raise ValueError(f"two runners for {kind}")
            RUNNERS[kind] = function
        return function

    return register


def is_known_family(kind: str) -> bool:
    """Whether a runner takes fixtures of the same family as `kind`."""
    return any(known.partition("/")[0] == kind.partition("/")[0] for known in RUNNERS)


def load_runners() -> None:
    """Imports every module of `tests/parity/runners`."""
    from parity import runners

    for module in pkgutil.iter_modules(runners.__path__):
        importlib.import_module(f"parity.runners.{module.name}")


@dataclasses.dataclass(frozen=True)
class Check:
    """One array to compare.

    Either `atol`/`rtol` (|got - want| <= atol + rtol * |want|), or `rel_max` (the largest
    difference over the largest value), or `exact`. `max_fraction` with `atol` allows that share of
    values to differ by no more than `atol`; the rest must be equal.
    """

    name: str
    got: np.ndarray
    want: np.ndarray
    atol: float = 0.0
    rtol: float = 0.0
    rel_max: float | None = None
    exact: bool = False
    max_fraction: float | None = None

    @functools.cached_property
    def result(self) -> tuple[float, float, str]:
        """(largest error, error over bound, bound in words); error over bound <= 1 passes."""
        got, want = np.asarray(self.got), np.asarray(self.want)
        if got.shape != want.shape:
            return np.inf, np.inf, f"shape {got.shape} != {want.shape}"
        if self.exact:
            differ = not np.array_equal(got, want)
            error = _max(np.abs(got.astype(np.float64) - want.astype(np.float64)))
            return error, np.inf if differ else 0.0, "exact"
        got, want = got.astype(np.float64), want.astype(np.float64)
        same = (got == want) | (np.isnan(got) & np.isnan(want))  # infinities that are meant
        with np.errstate(invalid="ignore"):
            error = np.where(same, 0.0, np.abs(got - want))
        error = np.where(np.isnan(error), np.inf, error)
        if self.max_fraction is not None:
            share = float(np.mean(error > 0)) if error.size else 0.0
            over = max(_max(error) / self.atol, share / self.max_fraction)
            return _max(error), over, f"{self.atol:g} on {self.max_fraction:.0%}"
        if self.rel_max is not None:
            finite = np.abs(want[np.isfinite(want)])
            top = max(_max(finite), np.finfo(np.float32).tiny)
            return _max(error), _max(error) / top / self.rel_max, f"{self.rel_max:g} of max"
        bound = self.atol + self.rtol * np.where(np.isfinite(want), np.abs(want), 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            over = np.where(error == 0, 0.0, error / bound)
        return _max(error), _max(over), f"{self.atol:g}+{self.rtol:g}|x|"

    @property
    def line(self) -> str:
        """`array  max error  bound  error over bound`."""
        error, over, bound = self.result
        verdict = "ok" if over <= 1 else "FAIL"
        return f"{self.name:<56} {error:9.2e}  {bound:<18} {over:7.3f}  {verdict}"


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A case that is not compared, as the option that it asks for is gone."""

    name: str
    option: str


def _max(values: np.ndarray) -> float:
    return float(np.max(values)) if np.size(values) else 0.0


@dataclasses.dataclass(frozen=True)
class Fixture:
    """A golden fixture on disk.

    Attributes:
      root: The folder that holds the families.
      path: The `.npz` file, or the folder.
      kind: `family/kind`: the folder of the family, then `kind` of the npz's meta or the name of
        the fixture's own folder.
    """

    root: pathlib.Path
    path: pathlib.Path
    kind: str

    @property
    def name(self) -> str:
        return str(self.path.relative_to(self.root).with_suffix(""))

    @functools.cached_property
    def config(self) -> dict:
        """The npz's `meta`, or the folder's `config.json`."""
        if self.path.is_file():
            return _meta(self.path)
        return json.loads((self.path / "config.json").read_text())

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Every array of the npz but `meta` and weights, or of the folder's `io.safetensors`."""
        if self.path.is_file():
            with np.load(self.path, allow_pickle=False) as file:
                return {k: file[k] for k in file.files if k != "meta" and not k.startswith("sd/")}
        return load_file(self.path / "io.safetensors")

    def npz(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of a file beside the folder's `config.json`; empty where there is none."""
        path = self.path / f"{name}.npz"
        if not path.is_file():
            return {}
        with np.load(path, allow_pickle=False) as file:
            return {key: upcast(file[key]) for key in file.files}

    @property
    def num_arrays(self) -> int:
        """How many arrays it holds, weights left out; a folder may keep them in several files."""
        if self.path.is_file():
            return len(self.arrays)
        files = [path for path in self.path.iterdir() if not path.stem.startswith("weights")]
        npz = [np.load(path) for path in files if path.suffix == ".npz"]
        names = [safe_open(path, "numpy").keys() for path in files if path.suffix == ".safetensors"]
        return sum(map(len, (*npz, *names)))

    def sibling(self, name: str) -> dict[str, np.ndarray]:
        """Tensors of another file, relative to this fixture's folder, float16 upcast to float32."""
        base = self.path.parent if self.path.is_file() else self.path
        return {key: upcast(value) for key, value in load_file((base / name).resolve()).items()}

    def sibling_fixture(self, name: str) -> "Fixture":
        """Another fixture beside this one (`"ddim_traj.npz"`, `"../system"`)."""
        base = self.path.parent if self.path.is_file() else self.path
        path = (base / name).resolve()
        return Fixture(path.parent.parent, path, _kind(path))

    def state_dict(self, prefix: str = "sd/") -> dict[str, np.ndarray]:
        """Original keys -> float32 arrays of an npz; follows `weights_from` / `weights_keys`."""
        out: dict[str, np.ndarray] = {}
        if source := self.config.get("weights_from"):
            other = self.sibling_fixture(source).state_dict(prefix)
            keys = self.config.get("weights_keys", list(other))
            out |= {key: other[key] for key in keys}
        with np.load(self.path, allow_pickle=False) as file:
            own = [key for key in file.files if key.startswith(prefix)]
            out |= {key.removeprefix(prefix): upcast(file[key]) for key in own}
        return out


def upcast(array: np.ndarray) -> np.ndarray:
    """float16 to float32; anything else as it is."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _meta(path: pathlib.Path) -> dict:
    with np.load(path, allow_pickle=False) as file:
        if "meta" not in file.files:
            raise ValueError(f"{path} has no `meta`")
        return json.loads(str(file["meta"]))


def _kind(path: pathlib.Path) -> str:
    is_npz = path.is_file() and "meta" in np.load(path).files
    family = ALIASES.get(path.parent.name, path.parent.name)
    return f"{family}/{_meta(path)['kind'] if is_npz else path.stem}"


def families(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders below `root`, each of a family; `root` itself if it holds fixtures."""
    if any((path / "config.json").is_file() for path in root.iterdir() if path.is_dir()):
        return [root.resolve()]
    return [path for path in sorted(root.resolve().iterdir()) if _is_visible_folder(path)]


def find_fixtures(family: pathlib.Path) -> Iterator[Fixture]:
    """Every fixture in the folder of a family."""
    for path in sorted(family.iterdir()):
        if path.suffix == ".npz" or _is_visible_folder(path):
            yield Fixture(family.parent, path, _kind(path))


def _is_visible_folder(path: pathlib.Path) -> bool:
    return path.is_dir() and path.name[0] not in "._"
