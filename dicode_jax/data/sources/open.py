"""Opens a data set of any known form as one kind of source."""

import glob
import itertools
import logging
import math
import os
import pathlib
import re
from typing import Literal

import numpy as np

from dicode_jax.data import encoded_cache
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import (
    ClipSource,
    Record,
    Subset,
    in_validation,
    some,
    suffix_of,
    told,
)
from dicode_jax.data.sources.array_record import ArrayRecordSource
from dicode_jax.data.sources.folder import FolderSource, files_below
from dicode_jax.data.sources.identity import leads_outside
from dicode_jax.data.sources.shapes import ShapesSource
from dicode_jax.data.sources.table import TABLE_SUFFIXES, TableSource
from dicode_jax.data.sources.tar import TarSource
from dicode_jax.errors import UserError, printable
from dicode_jax.storage.files import is_file_name

__all__ = ["ClipSource", "Record", "kind_of", "open_source", "shard_paths"]

_log = logging.getLogger(__name__)
_MAX_SHARDS = 1_000_000
_MAX_LINE = 1000  # letters of what is left out
_BRACES = re.compile(r"\{([^{}]*)\}")
_ARRAY_RECORD = re.compile(r"\.array_?record(-\d+-of-\d+)?$", re.IGNORECASE)


def open_source(
    cfg: DataConfig,
    *,
    split: Literal["train", "validation", "all"] = "train",
    seed: int = 0,
    images: bool = True,
) -> ClipSource:
    """Lists a data set; no pixels are read. What is no record is named in the log for `train`.

    Args:
      split: `validation` is the share `cfg.validation` of the records, by a hash of their canonical
        names, and may be empty; `train` is the rest. The synthetic world holds out captions
        instead.
      seed: Names the row of scenes of the synthetic world; other sources do not need it.
      images: False leaves pictures out (where the form of the data shows which ones they are).

    Raises:
      UserError: There is nothing at `cfg.path`, it is of no known form, or `split` other than
        `validation` is empty.
    """
    if not all(is_file_name(path) for path in (cfg.path, cfg.root or "")):
        raise UserError(f"no file can be called {cfg.path!r}, or {cfg.root!r}")
    try:
        return _open_source(cfg, split, seed, images)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or cfg.path}: {error.strerror}") from error


def _open_source(
    cfg: DataConfig, split: Literal["train", "validation", "all"], seed: int, images: bool
) -> ClipSource:
    kind = kind_of(cfg)
    if kind == "shapes":
        world = {"train": "train", "validation": "test", "all": "all"}[split]
        return ShapesSource(seed=seed, split=world)
    if kind == "cache":
        raise UserError(
            f"{cfg.path} is a token cache, which only the language model reads; give the videos"
        )
    root = cfg.root or None
    if kind == "folder":
        source, hashes = FolderSource.open(cfg.path, images=images, fence=root)
    elif kind == "table":
        source, hashes = TableSource.open(
            cfg.path,
            root=root,
            video_column=cfg.video_column,
            caption_column=cfg.caption_column,
            images=images,
        )
    else:
        paths = shard_paths(cfg.path, kind)
        inside = [path for path in paths if root is None or not leads_outside(path, root)]
        if kind == "tar":
            source, hashes = TarSource.open(inside, images=images)
        else:
            source, hashes = ArrayRecordSource.open(inside)
        if len(inside) < len(paths):
            line = f"{len(paths) - len(inside)} of {len(paths)} shards lead outside of {root}"
            source.left_out += (line,)
        beside = _listing(cfg.path, kind, shards=False) if os.path.isdir(cfg.path) else []
        if beside:
            source.left_out += (f"{len(beside)} files beside the shards: {some(beside)}",)
    source.left_out = tuple(printable(line, _MAX_LINE) for line in source.left_out)
    if not len(source):
        what = "videos" if not images else "videos and no pictures"
        more = f" ({source.left_out[0]})" if source.left_out else ""
        raise UserError(f"there are no {what} in {cfg.path}{more}")
    if split == "train":
        for line in told(source.left_out):
            _log.warning("left out: %s", line)
    if split == "all" or (split == "train" and cfg.validation == 0):
        return source
    held_out = in_validation(hashes, cfg.validation)
    subset = Subset(source, np.flatnonzero(held_out if split == "validation" else ~held_out))
    if split == "train" and not len(subset):
        raise UserError(f"all of {cfg.path} is held out; lower validation ({cfg.validation:g})")
    return subset


def kind_of(cfg: DataConfig) -> str:
    """What `cfg.path` is: shapes, folder, table, tar, array_record or cache.

    Raises:
      UserError: It cannot be told.
    """
    if cfg.kind != "auto":
        return cfg.kind
    if cfg.path == "shapes":
        return "shapes"
    path = pathlib.Path(cfg.path)
    if os.path.isdir(path):
        names = [entry.name for entry in os.scandir(path)]
        has_records = any(_ARRAY_RECORD.search(name) for name in names)
        if has_records:
            # One that is not finished has no manifest yet.
            is_begun = any(name.startswith(("encoded-", "tokens-")) for name in names)
            return "cache" if is_begun or encoded_cache.is_cache(path) else "array_record"
        return "tar" if any(suffix_of(name) == ".tar" for name in names) else "folder"
    if suffix_of(cfg.path) in TABLE_SUFFIXES:
        return "table"
    if re.search(r"\.tar(\.\w+)?$|\.tgz$", cfg.path, re.IGNORECASE):
        return "tar"
    if _ARRAY_RECORD.search(cfg.path):
        return "array_record"
    if os.path.isfile(path):
        return "folder"
    what = "does not exist" if not os.path.exists(path) else "is of no known form"
    raise UserError(
        f"{cfg.path} {what}; want `shapes`, a folder of videos, a .csv or .jsonl table, or .tar or "
        ".array_record shards"
    )


def shard_paths(pattern: str, kind: str) -> list[str]:
    """The shards that a folder, a file or a pattern names, sorted.

    A pattern may hold `*`, `?`, `**/` for all folders below and, as webdataset writes them,
    `{000..127}` and `{a,b}`.

    Raises:
      UserError: There are none, or one of a range is missing.
    """
    if os.path.isdir(pattern):
        paths = [os.path.join(pattern, name) for name in _listing(pattern, kind, shards=True)]
    else:
        paths = [pattern] if os.path.isfile(pattern) else []
        for one in () if paths else _braces(pattern):
            paths += sorted(_matches(one)) if glob.has_magic(one) else [one]
    if not paths:
        raise UserError(f"there are no shards at {pattern}")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(f"there is no file {missing[0]} ({len(missing)} of {len(paths)} missing)")
    return list(dict.fromkeys(paths))


def _matches(pattern: str) -> list[str]:
    """As `glob`, which for `**` would go round and round where links lead in circles."""
    top, deep, rest = pattern.partition("**/")
    if not deep:
        return glob.glob(pattern)
    found = []
    for folder in glob.glob(top) if top else ["."]:
        _, others, _ = files_below(folder, None)
        own = [name for name in others if pathlib.PurePath("/", name).match(rest)]
        found += [os.path.join(folder, name) if top else name for name in own]
    return found


def _listing(folder: str, kind: str, *, shards: bool) -> list[str]:
    """Names of the files in a folder that are shards, or of those that are not; sorted."""
    is_shard = _ARRAY_RECORD.search if kind == "array_record" else lambda n: n.endswith(".tar")
    names = (entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    files = {name: os.path.isfile(os.path.join(folder, name)) for name in names}
    taken = (n for n, is_file in files.items() if (is_file and bool(is_shard(n))) == shards)
    return sorted(n for n in taken if shards or not os.path.isdir(os.path.join(folder, n)))


def _braces(pattern: str) -> list[str]:
    """Writes out `{000..127}` and `{a,b}`."""
    choices, texts, at = [], [], 0
    for match in _BRACES.finditer(pattern):
        texts.append(pattern[at : match.start()])
        inner, at = match.group(1), match.end()
        span = re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", inner)
        if span:
            first, last = span.groups()
            width = len(first) if first.startswith("0") else 0
            choices.append((range(int(first), int(last) + 1), f"0{width}d"))
        else:
            choices.append((inner.split(","), "s"))
    rest = pattern[at:]
    if (count := math.prod(len(parts) for parts, _ in choices)) > _MAX_SHARDS:
        raise UserError(f"{pattern} stands for {count:,} shards; name at most {_MAX_SHARDS:,}")
    choices = [[format(part, how) for part in parts] for parts, how in choices]
    return [
        "".join(text + part for text, part in zip(texts, chosen, strict=True)) + rest
        for chosen in itertools.product(*choices)
    ]
