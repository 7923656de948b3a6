"""Models by name: a folder, a model of the package, or `owner/name` on the Hugging Face Hub.

Downloads are cached and resumed by `huggingface_hub`, which also honours `HF_HUB_OFFLINE`,
`HF_HOME` and `HF_TOKEN`. Only safetensors, JSON and text are fetched, no file that could hold code,
unless a converter asks `find_folder` for the files of an original; what a model is made of is sent.
"""

import itertools
import os
import pathlib
import re
import warnings
from collections.abc import Sequence
from typing import Any

from dicode_jax import config as config_lib
from dicode_jax import kinds
from dicode_jax.errors import UserError, printable
from dicode_jax.kinds import CONFIG_FILE
from dicode_jax.storage import packaged
from dicode_jax.storage.files import cache_folder

__all__ = ["FILES", "find_folder", "find_model", "upload"]

DEFAULT_MODEL = "shapes"
FILES = ("*.safetensors", "*.json", "*.txt", "*.md")

_SAY = {"HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}  # where downloads are kept
_WORD = r"[A-Za-z0-9](?:[\w-]|\.(?!\.)){0,95}"  # becomes a part of paths in the cache
_HUB_NAME = re.compile(f"{_WORD}/{_WORD}", re.ASCII)
_BARE_NAME = re.compile(_WORD, re.ASCII)
_REVISION = re.compile(rf"(?=.{{1,200}}$){_WORD}(?:[/+]{_WORD})*", re.ASCII)
_MODEL_FILE = re.compile(
    r"(\w[\w-]*/)?(config\.json|model\.safetensors|tokenizer\.json)"
    r"|README\.md|conversion\.json|(LICEN[CS]E|NOTICE)[\w.-]*\.(txt|md)"
)
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
    name, ours = str(path_or_name or DEFAULT_MODEL), packaged.models()
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
      UserError: There is nothing of that name, it cannot be reached, or the cache leads elsewhere.
    """
    name = str(path_or_name)
    _check_revision(revision)
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
    except Exception as error:  # also of its HTTP client, which is one of two
        raise UserError(f"cannot download {name}: {_first_line(error)}") from error
    for path in (pathlib.Path(folder), *pathlib.Path(folder).rglob("*")):
        if ".." in path.parts or _leads_out(path, pathlib.Path(folder)):
            raise UserError(f"{path} leads out of the cache of {name}: remove it")
    return pathlib.Path(folder)


def _leads_out(path: pathlib.Path, folder: pathlib.Path) -> bool:
    """Whether a path is a link out of a model; the files of a snapshot lie beside it in `blobs`."""
    if not path.is_symlink():
        return False
    real, homes = path.resolve(), [folder.resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append((homes[0].parents[1] / "blobs").resolve())
    return not any(home == real or home in real.parents for home in homes)


def _check_revision(revision: str | None) -> None:
    if revision is not None and not _REVISION.fullmatch(revision):
        raise UserError(f"no branch, tag or commit can be called {revision!r}")


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
      folder: Holds a configuration. What is sent are the files that a model is made of, its card,
        the report of its conversion, and what licences say; a warning names the others.
      name: `owner/name`.
      private: Whether a new repository is private; None for the owner's default.
      revision: Branch to commit to; None for the main one.
      token: Access token; None for the one that `hf auth login` stored.

    Raises:
      UserError: The folder is not a model or holds links that lead out of it, the name is not of
        the form `owner/name`, or the Hub refuses or is not reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    folder = pathlib.Path(folder)
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"{name!r} is not a name on the Hub: want owner/name")
    _check_revision(revision)
    files = _files_of_model(folder)
    api = huggingface_hub.HfApi(token=token, library_name="dicode_jax")
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            allow_patterns=files,
        )
    except errors.LocalTokenNotFoundError as error:
        raise UserError("nobody is logged in to the Hub; run: hf auth login") from error
    except Exception as error:  # also of its HTTP client, which is one of two
        raise UserError(f"cannot upload to {name}: {_first_line(error)}") from error
    return f"https://huggingface.co/{name}"


def _files_of_model(folder: pathlib.Path) -> list[str]:
    """Names of the files that a model is made of; a warning names what else lies in its folder."""
    if not os.path.isfile(folder / CONFIG_FILE):
        raise UserError(f"{folder} is not a model of dicode_jax: it holds no {CONFIG_FILE}")
    if config_lib.read_json(folder / CONFIG_FILE)[0] in kinds.TRAININGS:
        raise UserError(f"{folder} is the folder of a training; its model lies in {folder}/model")
    files, others = [], []
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        name = path.relative_to(folder).as_posix()
        is_model = _MODEL_FILE.fullmatch(name) is not None
        if _leads_out(path, folder) and (is_model or path.is_dir()):
            raise UserError(f"{path} is a link that leads out of the model: put a copy there")
        if is_model and path.is_file():
            files.append(name)
        elif not name.startswith(".") and not (path.is_dir() and path.parent == folder):
            others.append(name)
    if others:
        shown = ", ".join(printable(name, 60) for name in others[:5])
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        warnings.warn(f"not sent, as it is no part of a model: {shown}{more}", stacklevel=3)
    return files


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def called(asked: Any, revision: str | None, folder: pathlib.Path) -> str:
    """A name that finds the model again, and tells no more of this machine than was typed."""
    if asked is None:
        return folder.name
    name = str(asked)
    if pathlib.Path(asked).is_absolute():  # as `load` names it, which has found it
        is_snapshot = folder.parent.name == "snapshots"  # of the Hub: models--owner--name
        repository = folder.parents[1].name.removeprefix("models--").replace("--", "/", 1)
        name = f"{repository}@{folder.name}" if is_snapshot else folder.name
    return name if revision is None else f"{name}@{revision}"
