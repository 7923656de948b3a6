"""Videos that are kept as they are painted, so that an interrupted evaluation goes on."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dicode_jax.errors import UserError
from dicode_jax.storage.files import atomic_path, make_folder, read_object

SETTINGS_FILE = "settings.json"
PAGES = (".md", ".txt")

Paint = Callable[[Sequence[int]], Sequence[UInt8[np.ndarray, "f h w 3"]]]  # of these numbers


def fingerprint(folder: str | os.PathLike) -> str:
    """Changes when a file of a model does: names, sizes and times are looked at, not contents.

    What is written about a model, as Markdown or text, is no part of it.
    """
    folder = pathlib.Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() not in PAGES)
    found = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def painted(
    paint: Paint,
    count: int,
    folder: str | os.PathLike,
    settings: Mapping[str, Any],
    *,
    fps: float | None = None,
    at_once: int = 8,
) -> Iterator[UInt8[np.ndarray, "f h w 3"]]:
    """Videos 0 to `count`, in order: those that lie in `folder`, and what `paint` makes.

    Args:
      paint: Makes the videos of some numbers.
      count: How many are wanted; more may lie there.
      folder: Made if need be.
      settings: All that the videos depend on.
      fps: Frames a second of all, kept beside them for `read_kept`.
      at_once: Most numbers in a call of `paint`.

    Raises:
      UserError: Videos of other settings lie there, a file is broken or cannot be written.
    """
    folder = make_folder(folder)
    known, wanted = folder / SETTINGS_FILE, json.loads(json.dumps(settings))
    if not known.exists():
        with atomic_path(known) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1) + "\n")
    elif (found := read_object(known, "the settings of kept videos")) != wanted:
        names = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
        raise UserError(
            f"{folder} keeps videos of other settings ({', '.join(names)}); name another folder, "
            "or remove it"
        )
    for start in range(0, count, at_once):
        numbers = range(start, min(start + at_once, count))
        missing = [i for i in numbers if not _file(folder, i).exists()]
        new = map(np.asarray, paint(missing) if missing else ())
        made = dict(zip(missing, new, strict=True))
        for i, video in made.items():
            with atomic_path(_file(folder, i)) as temporary, open(temporary, "wb") as file:
                rate = np.nan if fps is None else float(fps)
                np.savez_compressed(file, video=video, fps=np.array(rate))
        for i in numbers:
            yield made[i] if i in made else read_kept(_file(folder, i))[0]


def _file(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"{number:06d}.npz"


def read_kept(path: str | os.PathLike) -> tuple[UInt8[np.ndarray, "f h w 3"], float | None]:
    """A video that `painted` kept, and its frames a second where they were told.

    Raises:
      UserError: It is none.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            video = held["video"]
            fps = float(held["fps"]) if "fps" in held else np.nan
    except MemoryError:
        raise
    except Exception as error:  # of many kinds: NumPy passes on what zip and zlib meet
        raise UserError(f"{path} is no kept video: {error}") from error
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise UserError(f"{path} is no kept video, but {video.dtype} {list(video.shape)}")
    if np.isnan(fps):
        return video, None
    if not 0 < fps < np.inf:
        raise UserError(f"{path} is no kept video: it has {fps} frames a second")
    return video, fps
