"""The configurations that come with the original models, of which nothing is taken on trust."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from dicode_jax import config as config_lib
from dicode_jax.errors import UserError, printable
from dicode_jax.storage.files import read_small

_MAX_YAML = 1 << 16  # bytes; the originals' have four thousand, and PyYAML takes a second for these


def read_options(path: str | pathlib.Path) -> dict[str, Any]:
    """The arguments of the `model` node of an original configuration.

    Raises:
      UserError: The file cannot be read, or holds no such node.
    """
    import yaml

    text = read_small(path, _MAX_YAML)
    try:
        # A few lines of aliases stand for a billion values, and merges write these out.
        if any(isinstance(e, yaml.AliasEvent) for e in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it holds aliases (*name); write out what they stand for")
        node = yaml.safe_load(text)
    except Exception as error:  # dates, numbers and brackets make PyYAML fail in many ways
        raise UserError(f"{path} is not a readable YAML file: {printable(error, 300)}") from error
    for name in ("model", "params"):
        if isinstance(node, Mapping):
            node = node.get(name, node)
    if not isinstance(node, Mapping):
        raise UserError(f"{path} holds no configuration of a model")
    return dict(node)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """While entered, whatever goes wrong is the fault of the configuration that is read.

    Args:
      what: Says which, and what it is not: "x.yaml is no configuration of DiCoDe".

    Raises:
      UserError: Something went wrong.
    """
    try:
        yield
    except Exception as error:  # a foreign file may have anything in the place of a number
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{what}: {reason or type(error).__name__}") from error


def typed(config: Any) -> Any:
    """The configuration, a dataclass, once every value is seen to have its type.

    Raises:
      UserError: One has another.
    """
    config_lib.from_dict(type(config), config_lib.to_dict(config))
    return config
