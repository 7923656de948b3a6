"""Models by name: a folder, a model of the package, or `owner/name` on the Hugging Face Hub.

Downloads are cached and resumed by `huggingface_hub`, which also honours `HF_HUB_OFFLINE`,
`HF_HOME` and `HF_TOKEN`. Only safetensors, JSON and text are fetched or sent, no file that could
hold code, unless a converter asks `find_folder` for the files of an original.
"""

import hashlib
import importlib.resources
import itertools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from dicode_jax.errors import UserError
from dicode_jax.kinds import CONFIG_FILE
from dicode_jax.storage.files import cache_folder, read_small

__all__ = ["FILES", "check_packaged", "find_folder", "find_model", "packaged", "upload"]

ASSETS = "dicode_jax.assets"
SUMS_FILE = "SHA256SUMS"  # of weights, configs and tokenizers; as `sha256sum` writes it
DEFAULT_MODEL = "shapes"
FILES = ("*.safetensors", "*.json", "*.txt", "*.md")

_SAY = {"HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}  # where downloads are kept
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BARE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_FILE_NAME = re.compile(r".*\.(json|txt|gz|safetensors|bin|pt|pth|ckpt)")  # and no model's


def find_model(
    path_or_name: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    **options: Any,
) -> pathlib.Path:
    """The folder of a model; one on the Hub is downloaded, unless it is in the cache already.

    Args:
      path_or_name: A folder, the name of a packaged model, or `owner/name` on the Hub; None for the
        packaged default. A folder wins over a model of the same name.
      revision: Branch, tag or commit of a model on the Hub.
      options: See `find_folder`.

    Raises:
      UserError: There is no such model, it cannot be reached, or it holds no configuration.
    """
    name, ours = str(path_or_name or DEFAULT_MODEL), packaged()
    is_folder = path_or_name is not None and os.path.isdir(path_or_name)
    if not is_folder and name in ours and revision is None:
        return ours[name]
    if not is_folder and not _HUB_NAME.fullmatch(name) and revision is None:
        raise UserError(
            f"no model {name!r}: it is neither a folder, a packaged model "
            f"({', '.join(sorted(ours)) or 'there is none'}) nor a name owner/name on the Hub"
        )
    folder = find_folder(name, revision=revision, **options)
    if not os.path.isfile(folder / CONFIG_FILE):
        label = name if folder == pathlib.Path(name) else f"{name} on the Hub"
        raise UserError(f"{label} is not a model of dicode_jax: it holds no {CONFIG_FILE}")
    return folder


def find_folder(
    path_or_name: str | os.PathLike,
    patterns: Sequence[str] = FILES,
    *,
    either: Sequence[str] = (),
    bare: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> pathlib.Path:
    """The folder of a name, whatever it holds; files of the Hub are downloaded into its cache.

    Args:
      path_or_name: A folder, or a file where files are taken, or `owner/name` on the Hub. What is
        there wins over a name.
      patterns: Files of the Hub that are wanted.
      either: Patterns too, in order of preference: of the first that matches a file, and no other.
      bare: Whether a name without an owner, such as `gpt2`, is the Hub's.
      revision: Branch, tag or commit on the Hub.
      cache_dir: Where downloads are kept; None for the Hub's usual cache.
      local_files_only: Take what is in the cache and ask nobody.
      token: Access token; None for the one that `hf auth login` stored.

    Raises:
      UserError: There is nothing of that name, or it cannot be reached.
    """
    name = str(path_or_name)
    is_there = os.path.lexists(name)
    is_of_hub = _HUB_NAME.fullmatch(name) or (bare and _BARE_NAME.fullmatch(name))
    if is_there or not is_of_hub or _FILE_NAME.fullmatch(name):
        if revision is not None:
            raise UserError(f"{name} is not a model on the Hub: it has no revision {revision!r}")
        if is_there:
            return pathlib.Path(name)
        raise UserError(f"there is nothing at {name}, and it is no name owner/name on the Hub")
    options = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    folder = _download(name, revision=revision, patterns=[*patterns, *either[:1]], **options)
    for before, pattern in itertools.pairwise(either):
        if any(folder.glob(before)):
            break
        folder = _download(name, revision=revision, patterns=[pattern], **options)
    return folder


def _download(
    name: str, *, revision: str | None, patterns: Sequence[str], **options: Any
) -> pathlib.Path:
    """Brings files of a repository into the cache and returns its folder there."""
    import huggingface_hub
    from huggingface_hub import errors

    if options.get("cache_dir") is None and cache_folder() is None and not _SAY & set(os.environ):
        raise UserError(f"there is no home folder to keep {name} in; set HF_HOME to a folder")
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            **options,
            allow_patterns=list(patterns),
            library_name="dicode_jax",
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} wants its terms accepted: visit its page on the Hub, then run: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no folder {name}, and no such model on the Hub (if it is private, run: "
            "hf auth login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name} on the Hub has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        which = name if revision is None else f"{name} at {revision!r}"
        raise UserError(
            f"there is no folder {name}; on the Hub, {which} is not in the cache, and the Hub "
            "is not reached (no network, or offline mode)"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot download {name}: {_first_line(error)}") from error
    return pathlib.Path(folder)


def upload(
    folder: str | os.PathLike,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Sends a model folder to the Hub, making the repository if need be, and returns its address.

    Args:
      folder: Holds a configuration; only safetensors, JSON and text files are sent.
      name: `owner/name`.
      private: Whether a new repository is private; None for the owner's default.
      revision: Branch to commit to; None for the main one.
      token: Access token; None for the one that `hf auth login` stored.

    Raises:
      UserError: The folder is not a model, the name is not of the form `owner/name`, or the Hub
        refuses.
    """
    import huggingface_hub
    from huggingface_hub import errors

    folder = pathlib.Path(folder)
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"{name!r} is not a name on the Hub: want owner/name")
    if not os.path.isfile(folder / CONFIG_FILE):
        raise UserError(f"{folder} is not a model of dicode_jax: it holds no {CONFIG_FILE}")
    api = huggingface_hub.HfApi(token=token, library_name="dicode_jax")
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            allow_patterns=list(FILES),
        )
    except errors.LocalTokenNotFoundError as error:
        raise UserError("nobody is logged in to the Hub; run: hf auth login") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot upload to {name}: {_first_line(error)}") from error
    return f"https://huggingface.co/{name}"


def packaged() -> dict[str, pathlib.Path]:
    """Models in the package, by name."""
    root = pathlib.Path(str(importlib.resources.files(ASSETS)))
    return {path.parent.name: path.parent for path in root.glob(f"*/{CONFIG_FILE}")}


def check_packaged(name: str) -> int:
    """Compares the files of a packaged model with the SHA-256 that the package lists.

    Returns:
      How many there are.

    Raises:
      UserError: One is missing or changed, or none is listed.
    """
    root = packaged()[name].parent
    lines = read_small(root / SUMS_FILE).decode().splitlines()
    listed = [line.split("  ", 1) for line in lines]
    own = {path: digest for digest, path in listed if path.startswith(f"{name}/")}
    wrong = [path for path, digest in own.items() if _sha256(root / path) != digest]
    if wrong or not own:
        what = f"{wrong[0]} is not" if wrong else "its files are not listed"
        raise UserError(
            f"the packaged model {name} is damaged: {what} as it was packaged; install again"
        )
    return len(own)


def _sha256(path: pathlib.Path) -> str:
    """Of a file; empty when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
