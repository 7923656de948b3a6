"""Command lines of the trainings: options of a command, and every field of its config, as one."""

import contextlib
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from dicode_jax import config as config_lib
from dicode_jax.errors import UserError, print_any_name
from dicode_jax.runtime.distributed import Processes

VERBOSE = ("-H", "--help-verbose")
HELP = ("-h", "--help", *VERBOSE)
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """Which config a command takes.

    Attributes:
      config: Config file, such as configs/shapes_ar.py.
      help_config: List the fields of the config, each of which is an option too (-H explains them).
    """

    config: pathlib.Path | None = None
    help_config: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What a command line says.

    Attributes:
      options: Of the command itself.
      processes: Who joins the run.
      config: That of the file, with its overrides.
      said: Names of the options in it, dotted, with underscores.
    """

    options: Any
    processes: Processes
    config: Any
    said: frozenset[str]


def parse(
    args: Sequence[str] | None,
    config_types: tuple[type, ...],
    options: Callable[[str], Any],
    *,
    prog: str,
    about: str,
) -> Command:
    """Reads a command line; help, and what no parser understands, end the program.

    Args:
      args: Its words, those of the process by default.
      config_types: Configs that the command takes.
      options: Makes the command's own options, with their defaults, of the name of the config.
      prog: Name of the module that is run.
      about: What it does, in a line.

    Raises:
      UserError: There is no config file, or it configures something else.
    """
    print_any_name()
    args, prog = list(sys.argv[1:] if args is None else args), f"python -m {prog}"
    only = {"return_unknown_args": True, "add_help": False}
    file, _ = config_lib.from_args(ConfigFile, args, prog=prog, **only)
    config = None if file.config is None else _load(file.config, config_types, prog)
    if file.help_config:
        _help_config(config, config_types, args, prog)
    own = options("CONFIG" if config is None else file.config.stem)
    parts = {"file": ConfigFile(), "options": own, "processes": Processes()}
    if config is not None and not set(HELP) & set(args):
        parts["config"] = config
    flat = functools.partial(tyro.conf.arg, name="")
    fields = [(name, Annotated[type(part), flat()]) for name, part in parts.items()]
    kind = dataclasses.make_dataclass("Command", fields)
    about += " Every field of the config is an option too, such as --seed 1: see --help-config."
    parsed = config_lib.from_args(kind, args, default=kind(**parts), prog=prog, description=about)
    if config is None:
        raise UserError("say what to do by --config FILE; the project's own lie in configs/")
    said = {word.split("=")[0].lstrip("-") for word in args if word.startswith("--")}
    return Command(
        options=parsed.options,
        processes=parsed.processes,
        config=parsed.config,
        said=frozenset(name.replace("-", "_") for name in said),
    )


def _load(path: pathlib.Path, config_types: tuple[type, ...], prog: str) -> Any:
    config = config_lib.load_config_file(path)
    if not isinstance(config, config_types):
        wanted = " or ".join(kind.__name__ for kind in config_types)
        raise UserError(f"{path} configures {type(config).__name__}; {prog} wants {wanted}")
    return config


def _help_config(
    config: Any, config_types: tuple[type, ...], args: Sequence[str], prog: str
) -> None:
    """Lists the fields of a config, or of one of each kind that the command takes, and ends."""
    configs = [config]
    if config is None:
        paths = [p for p in CONFIGS.rglob("*.py") if "def get_config" in p.read_text("utf-8")]
        paths.sort(key=lambda path: (not path.name.startswith("shapes_"), path))
        known = [config_lib.load_config_file(path) for path in paths]
        configs = [next(c for c in known if isinstance(c, kind)) for kind in config_types]
    word = "-H" if set(VERBOSE) & set(args) else "--help"
    for config in configs:
        with contextlib.suppress(SystemExit):
            config_lib.from_args(type(config), [word], default=config, prog=prog)
    raise SystemExit(0)
