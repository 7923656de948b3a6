"""The YAML configurations that come with the original models."""

import pathlib
from collections.abc import Mapping
from typing import Any

from dicode_jax.errors import UserError


def read_options(path: str | pathlib.Path) -> dict[str, Any]:
    """The arguments of the `model` node of an original configuration.

    Raises:
      UserError: The file cannot be read, or holds no such node.
    """
    import yaml

    try:
        node = yaml.safe_load(pathlib.Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path} is not a readable YAML file: {line}") from error
    for name in ("model", "params"):
        if isinstance(node, Mapping):
            node = node.get(name, node)
    if not isinstance(node, Mapping):
        raise UserError(f"{path} holds no configuration of a model")
    return dict(node)
