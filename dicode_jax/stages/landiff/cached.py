"""What LanDiff's trainings read: a cache of codes, latents, motion and text of whole videos.

An example is a video of f frames, which is g = (f - 1) / 4 + 1 semantic frames and as many latents:
`codes` int16, as `FrameTokens.count(g)` says; `latents` bfloat16 [g, h, w, c]; `motion` float32
[g]; `lm_text` and `dit_text` bfloat16 [t, e] where text encoders were named.
"""

import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from dicode_jax.data.config import DataConfig
from dicode_jax.data.encoded_cache import EncodedCache
from dicode_jax.data.records import in_validation, name_hash
from dicode_jax.errors import UserError, printable
from dicode_jax.storage import weights


def part_folder(folder: str | pathlib.Path, *names: str) -> pathlib.Path:
    """The part of a run's model or of a pipeline by one of its names, or the folder itself.

    Raises:
      UserError: There is none of them.
    """
    folder = pathlib.Path(folder)
    for path in (*(folder / name for name in names), folder):
        if (path / weights.WEIGHTS_FILE).is_file():
            return path
    raise UserError(f"no {' and no '.join(names)} in {folder}: name the `model` folder of its run")


def open_cache(
    data: DataConfig, needs: Sequence[str], *, tokenizer: str | None = None, vae: str | None = None
) -> EncodedCache:
    """The cache that a config names.

    Args:
      needs: Arrays that it must hold.
      tokenizer, vae: Folders that it must have been made with; None does not look.

    Raises:
      UserError: It is none, lacks an array, or was made with something else.
    """
    cache = EncodedCache.shared(data.path)
    missing = [name for name in needs if name not in cache.schema]
    if missing:
        raise UserError(
            f"the cache {cache.folder} holds no {' and no '.join(missing)}: encode the videos "
            "again (python -m train.encode), naming what makes them"
        )
    for name, folder in (("tokenizer", tokenizer), ("vae", vae)):
        if folder is None:
            continue
        now = weights.hash_module(part_folder(folder, name, f"semantic_{name}"))
        if now != (then := str(cache.setting(name))):
            raise UserError(
                f"the cache {cache.folder} was made with another {name} than {folder} now holds "
                f"({printable(then[:12])}, not {now[:12]}): encode the videos again, or name the "
                "one that it was made with"
            )
    return cache


def split_videos(
    cache: EncodedCache, share: float, split: Literal["train", "validation"]
) -> np.ndarray:
    """Numbers of the videos of a split, by a hash of their names."""
    videos = np.arange(len(cache))
    if not share and split == "train":
        return videos
    held_out = in_validation(np.array([name_hash(n) for n in cache.names], np.uint64), share)
    return videos[held_out if split == "validation" else ~held_out]


def span_motion(motion: np.ndarray, start: int, stop: int) -> float:
    """Motion score of the semantic frames from `start` to before `stop`; 0 of a single one."""
    return float(np.mean(motion[start + 1 : stop])) if stop - start > 1 else 0.0
