"""A table of videos with a place for their captions, which people or programs fill in.

    write_template("clips/captions.jsonl", videos)

A training reads it as it is: `--data.path clips/captions.jsonl`.
"""

import csv
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from dicode_jax.data.config import DataConfig
from dicode_jax.data.filtering import Video
from dicode_jax.data.records import MediaFile
from dicode_jax.data.sources.open import open_source
from dicode_jax.errors import UserError
from dicode_jax.storage.files import atomic_path, check_output

SUFFIXES = (".jsonl", ".csv")


def known_captions(path: str | os.PathLike) -> dict[str, tuple[str, ...]]:
    """The captions of a table, by the real path of their videos; none of a table that is not there.

    Raises:
      UserError: The table cannot be read as a whole.
    """
    path = check_output(path, SUFFIXES)
    if not os.path.exists(path) or not path.stat().st_size:
        return {}
    source = open_source(DataConfig(path=str(path), kind="table"), split="all")
    if source.left_out:
        raise UserError(f"{source.left_out[0]}; mend the table, or name another one")
    records = [source.record(index) for index in range(len(source))]
    return {
        os.path.realpath(record.media.path): record.captions
        for record in records
        if isinstance(record.media, MediaFile)
    }


def check_none_is_lost(
    path: str | os.PathLike, known: Mapping[str, tuple[str, ...]], videos: Sequence[Video]
) -> None:
    """Makes sure that a table of these videos has a place for all captions of the one before it.

    Raises:
      UserError: It has not.
    """
    kept = {os.path.realpath(video.path) for video in videos}
    lost = [file for file, captions in known.items() if captions and file not in kept]
    if lost:
        raise UserError(
            f"{path} has captions of {len(lost)} videos that are not kept now, such as {lost[0]}; "
            "name another table with --captions"
        )


def write_template(
    path: str | os.PathLike,
    videos: Sequence[Video],
    known: Mapping[str, tuple[str, ...]] | None = None,
    *,
    folder: str | os.PathLike | None = None,
) -> int:
    """Writes a row for each caption of each video, and an empty one for a video without.

    Args:
      path: A .jsonl or .csv; the files are named from its folder.
      videos: In their order.
      known: More captions, see `known_captions`.
      folder: Where the videos lie under their names; None for their own places.

    Returns:
      How many videos have no caption.

    Raises:
      UserError: It cannot be written.
    """
    path = check_output(path, SUFFIXES, sources=[video.path for video in videos])
    home, rows, without = os.path.realpath(path.parent), [], 0
    for video in videos:
        file = video.path if folder is None else os.path.join(folder, video.name)
        there = os.path.realpath(os.path.dirname(file) or ".")
        name = os.path.relpath(os.path.join(there, os.path.basename(file)), home)
        own = (known or {}).get(os.path.realpath(video.path), ())
        captions = dict.fromkeys((*video.captions, *own))
        without += not captions
        rows += [(name, caption) for caption in captions or ("",)]
    with atomic_path(path) as temporary:
        errors = "surrogateescape"  # names that are no text
        with temporary.open("w", encoding="utf-8", errors=errors, newline="") as file:
            if pathlib.Path(path).suffix.lower() == ".csv":
                csv.writer(file, lineterminator="\n").writerows([("video", "caption"), *rows])
            else:
                file.writelines(
                    json.dumps({"video": name, "caption": caption}, ensure_ascii=False) + "\n"
                    for name, caption in rows
                )
    return without
