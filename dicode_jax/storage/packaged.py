"""The models in the package, and whether they are as they were packaged."""

import hashlib
import importlib.resources
import pathlib

from dicode_jax.errors import UserError
from dicode_jax.kinds import CONFIG_FILE
from dicode_jax.storage.files import read_small

__all__ = ["check", "models"]

ASSETS = "dicode_jax.assets"
SUMS_FILE = "SHA256SUMS"  # of weights, configs and tokenizers; as `sha256sum` writes it


def models() -> dict[str, pathlib.Path]:
    """The folders of the models, by name."""
    root = pathlib.Path(str(importlib.resources.files(ASSETS)))
    return {path.parent.name: path.parent for path in root.glob(f"*/{CONFIG_FILE}")}


def check(name: str) -> int:
    """Compares the files of a model with the SHA-256 that the package lists.

    Returns:
      How many there are.

    Raises:
      UserError: One is missing or changed, or none is listed.
    """
    root = models()[name].parent
    lines = read_small(root / SUMS_FILE).decode().splitlines()
    listed = [line.split("  ", 1) for line in lines]
    own = {path: digest for digest, path in listed if path.startswith(f"{name}/")}
    wrong = [path for path, digest in own.items() if _sha256(root / path) != digest]
    if wrong or not own:
        what = f"{wrong[0]} is not as it was packaged" if wrong else "its files are not listed"
        raise UserError(f"the packaged model {name} is damaged: {what}; install again")
    return len(own)


def _sha256(path: pathlib.Path) -> str:
    """Of a file; empty when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
