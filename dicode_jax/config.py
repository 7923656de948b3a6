"""Config files, command-line overrides and JSON, all for frozen dataclasses.

A config file defines `get_config()`, which returns a dataclass; the command line overrides single
fields (`--optim.lr 1e-4`); the resolved config is written beside every checkpoint and read back
from there.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import runpy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import cattrs
import cattrs.strategies

from dicode_jax import kinds
from dicode_jax.errors import OptionGone, UserError
from dicode_jax.storage.files import atomic_path, read_object

__all__ = [
    "check_counts",
    "from_args",
    "from_dict",
    "from_json",
    "load_config_file",
    "read_json",
    "to_dict",
    "to_json",
    "without_retired",
]

Config = TypeVar("Config")
MAX_FILE = 1 << 22  # bytes of a config.json, with notes on where weights come from
MAX_LIST = 10_000  # values


def load_config_file(path: str | pathlib.Path) -> Any:
    """Runs a config file and returns what its `get_config()` returns.

    Raises:
      UserError: There is no such file, or it defines no `get_config`.
    """
    path = pathlib.Path(path)
    if not os.path.isfile(path):
        raise UserError(
            f"no config file at {path}; the ones that come with the project lie in configs/"
        )
    module = runpy.run_path(str(path), run_name=f"_config_{path.stem}")
    if "get_config" not in module:
        raise UserError(f"{path} defines no get_config()")
    return module["get_config"]()


def from_args(kind: type[Config], args: Sequence[str], **options: Any) -> Config:
    """Fills a dataclass from a command line such as `--field.sub value`; `--help` lists its fields.

    Unknown flags end the program with a message that names the nearest known one.

    Args:
      options: Of `tyro.cli`, such as `default` and `prog`.

    Raises:
      UserError: A value is one that the dataclass refuses, or no finite number.
    """
    import tyro

    # A field that may hold one of several dataclasses keeps the kind of its default.
    options = {"config": (tyro.conf.AvoidSubcommands,), "compact_help": True} | options
    try:
        made = tyro.cli(kind, args=list(args), **options)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error
    held = made[0] if options.get("return_unknown_args") else made
    for name, value in leaves(dataclasses.asdict(held)).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, got {value}")
    return made


def to_dict(config: Any) -> dict[str, Any]:
    """A JSON-ready dictionary (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by their dotted names."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    out = {}
    for key, value in tree.items():
        out |= leaves(value, f"{prefix}{key}.")
    return out


def from_dict(kind: type[Config], data: dict[str, Any]) -> Config:
    """Builds the dataclass `kind` from a dictionary.

    `kind`, or a field of it, may be a union of dataclasses that tell themselves apart by a field
    `kind`; data without one is of the first. Fields that are gone: see `without_retired`.

    Raises:
      UserError: A field is unknown, missing, of the wrong type, or gone and in use.
    """
    try:
        return _converter().structure(data, kind)
    except (cattrs.BaseValidationError, *_REFUSALS) as error:
        reason = lambda e, _: "missing" if isinstance(e, KeyError) else " ".join(str(e).split())  # noqa: E731
        lines = "; ".join(cattrs.transform_error(error, format_exception=reason))
        name = getattr(kind, "__name__", str(kind))
        raise UserError(f"the configuration does not fit {name}: {lines}") from error


_REFUSALS = (ValueError, TypeError, ArithmeticError, RecursionError)


@functools.cache
def _converter() -> cattrs.Converter:
    """Takes no value for one of another type, but whole numbers for fractions."""
    made = cattrs.Converter(forbid_extra_keys=True)
    fill_tuple = made.get_structure_hook(tuple)

    def exactly(data: Any, kind: type) -> Any:
        if type(data) is not kind and (type(data), kind) not in ((int, float), (tuple, list)):
            raise TypeError(f"want {kind.__name__}, got {data!r}")
        if kind is float and not math.isfinite(data):
            raise ValueError(f"want a finite number, got {data}")
        return kind(data)

    @made.register_structure_hook_factory(lambda kind: get_origin(kind) is tuple)
    def _(_):
        def fill(data, kind):
            if isinstance(data, list) and len(data) > MAX_LIST:  # each fault is told by itself
                raise ValueError(f"want at most {MAX_LIST} values, got {len(data)}")
            return fill_tuple(exactly(data, list), kind)

        return fill

    @made.register_structure_hook_factory(dataclasses.is_dataclass)
    def _(kind):
        fill = cattrs.gen.make_dict_structure_fn(kind, made)
        return lambda data, _: fill(without_retired(kind, exactly(data, dict)), kind)

    def member(data: Any, union: Any) -> Any:
        kinds = {get_args(get_type_hints(kind)["kind"])[0]: kind for kind in get_args(union)}
        name = exactly(data, dict).get("kind", next(iter(kinds)))
        if name not in kinds:
            raise ValueError(f"unknown kind {name!r}; known are {', '.join(kinds)}")
        return made.structure(data, kinds[name])

    is_union = lambda kind: all(map(dataclasses.is_dataclass, get_args(kind) or [None]))  # noqa: E731
    made.register_structure_hook_func(is_union, member)
    for kind in (bool, int, float, str):
        made.register_structure_hook(kind, exactly)
    cattrs.strategies.configure_union_passthrough(bool | int | float | str | None, made)
    return made


def check_counts(config: Any, **most: int) -> None:
    """Refuses counts far beyond those of any model: what a module is built of takes its time.

    Args:
      config: Holds them, as numbers or as tuples of so many.
      most: Field -> the largest count.

    Raises:
      ValueError: One is larger.
    """
    for name, high in most.items():
        value = getattr(config, name)
        count = len(value) if isinstance(value, tuple) else value
        if count > high:
            raise ValueError(f"{name} must be at most {high}, got {count}")


def without_retired(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a dataclass without the fields that are gone, as its `RETIRED` has them.

    `RETIRED` maps a name to what replaced it, of which a warning speaks, or to `(value, what
    replaced it)` for an option: at that value it was off and is passed over.

    Raises:
      OptionGone: Such an option has another value.
    """
    retired = getattr(kind, "RETIRED", {})
    for name in sorted(data.keys() & retired.keys()):
        if isinstance(retired[name], str):
            warnings.warn(f"{name} is gone: {retired[name]} has replaced it", stacklevel=2)
        elif data[name] != retired[name][0]:
            raise OptionGone(name, data[name], retired[name][1])
    return {name: value for name, value in data.items() if name not in retired}


def to_json(
    config: Any, path: str | pathlib.Path, *, notes: Mapping[str, Any] | None = None
) -> None:
    """Writes the config as indented JSON with its kind and version, whole or not at all.

    Args:
      notes: Facts that are no settings, such as where weights come from. Their names get a leading
        underscore, by which `from_json` knows to leave them out.
    """
    kind = kinds.kind_of(type(config))
    data = {} if kind is None else {"kind": kind, "version": kinds.VERSION}
    data |= {f"_{name}": value for name, value in (notes or {}).items()} | to_dict(config)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")


def read_json(path: str | pathlib.Path) -> tuple[str | None, dict[str, Any]]:
    """What a `config.json` says: its kind, None in one of an earlier release, and its settings.

    Raises:
      UserError: The file is missing or is no JSON object, or its kind or version is not known.
    """
    path = pathlib.Path(path)
    if not os.path.exists(path):
        raise UserError(f"no configuration at {path}")
    data = read_object(path, "a configuration", MAX_FILE)
    kind, version = data.get("kind"), data.pop("version", kinds.VERSION)
    if version != kinds.VERSION:
        raise UserError(
            f"{path} is of version {version!r}, known is {kinds.VERSION}: take a newer dicode_jax"
        )
    if kind is not None and str(kind) not in kinds.KINDS:
        raise UserError(f"{path} is of the kind {kind!r}; known are {', '.join(kinds.KINDS)}")
    return kind, {name: value for name, value in data.items() if not name.startswith("_")}


def from_json(config_type: type[Config], path: str | pathlib.Path) -> Config:
    """Reads a config written by `to_json`.

    Raises:
      UserError: As `read_json`, or the file is of another kind or does not fit `config_type`.
    """
    kind, data = read_json(path)
    members: tuple[Any, ...] = get_args(config_type) or (config_type,)
    wanted = [kinds.kind_of(member) for member in members]
    if kind is not None and kind not in wanted:
        raise UserError(f"{path} is of the kind {kind!r}, not {' or '.join(map(repr, wanted))}")
    if not any(field.name == "kind" for member in members for field in dataclasses.fields(member)):
        data.pop("kind", None)
    return from_dict(config_type, data)
