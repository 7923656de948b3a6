"""The models in the package, and whether they are as they were packaged."""

import hashlib
import importlib.resources
import pathlib

from dicode_jax.errors import UserError
from dicode_jax.kinds import CONFIG_FILE, PIPELINES
from dicode_jax.storage.files import parse_json, read_small

__all__ = ["check", "models", "parts"]

ASSETS = "dicode_jax.assets"
SUMS_FILE = "SHA256SUMS"  # of weights, configs and tokenizers; as `sha256sum` writes it


def models() -> dict[str, pathlib.Path]:
    """The folders of the models that generate, by name."""
    return {name: folder for name, folder in _folders().items() if _is_pipeline(folder)}


def parts() -> dict[str, pathlib.Path]:
    """The folders of networks that are no models by themselves, by name."""
    return {name: folder for name, folder in _folders().items() if not _is_pipeline(folder)}


def _folders() -> dict[str, pathlib.Path]:
    root = pathlib.Path(str(importlib.resources.files(ASSETS)))
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{CONFIG_FILE}"))}


def _is_pipeline(folder: pathlib.Path) -> bool:
    """Whether a folder's config is of one; a broken one is, so that it is looked at and named."""
    try:
        found = parse_json(read_small(folder / CONFIG_FILE), folder / CONFIG_FILE)
    except UserError:
        return True
    return not isinstance(found, dict) or found.get("kind", "dicode") in PIPELINES


def check(name: str) -> int:
    """Compares the files of a model or a part with the SHA-256 that the package lists.

    Returns:
      How many there are.

    Raises:
      UserError: One is missing or changed, or none is listed.
    """
    root = _folders()[name].parent
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
