"""`dicode evaluate --videos DIR --reference DIR`: distances of two folders of videos."""

import argparse
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from dicode_jax.cli import video
from dicode_jax.errors import UserError

KEPT = ".npz"  # as a suite keeps its videos


def files_of(folder: str) -> list[pathlib.Path]:
    """The videos of a folder, those below it too, in order of their names.

    Raises:
      UserError: There are none.
    """
    from dicode_jax.data.records import VIDEO_SUFFIXES

    if not pathlib.Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}")
    known = VIDEO_SUFFIXES | {KEPT}
    found = [path for path in pathlib.Path(folder).rglob("*") if path.suffix.lower() in known]
    if not found:
        raise UserError(f"{folder} holds no videos")
    return sorted(found)


def clips_of(paths: Sequence[pathlib.Path], features, progress: Callable) -> list[Any]:
    """The clip of each file that goes through a network.

    Raises:
      UserError: A file cannot be read, or is too short.
    """
    from dicode_jax.data.shapes_world import FPS
    from dicode_jax.evaluation.kept import read_kept
    from dicode_jax.media.video import iter_frames_at

    clips = []
    for i, path in enumerate(paths):
        progress("videos", i, len(paths))
        if path.suffix == KEPT:
            clips.append(features.clip(read_kept(path), FPS, path))
        else:
            shown = itertools.islice(iter_frames_at(path, features.fps), features.num_frames)
            clips.append(features.clip([frame.image for frame in shown], features.fps, path))
    progress("videos", len(paths), len(paths))
    return clips


def compare(args: argparse.Namespace) -> Any:
    """The report of the distances of the videos of one folder from those of another.

    Raises:
      UserError: The folders do not hold equally many, or one cannot be read.
    """
    from dicode_jax.evaluation import distribution, report

    first, second = files_of(args.videos), files_of(args.reference)
    distribution.check_counts(len(first), len(second))
    features = distribution.shapes_features(args.features)
    with video.progress_bar() as progress:
        sets = [clips_of(paths, features, progress) for paths in (first, second)]
    values = distribution.distances(features, *sets)
    settings = {
        "videos": args.videos,
        "reference": args.reference,
        "count of each": len(first),
        **distribution.protocol(features),
    }
    return report.Report(
        title="How far apart are two sets of videos?",
        settings=settings,
        values=values,
        notes=distribution.NOTES,
    )
