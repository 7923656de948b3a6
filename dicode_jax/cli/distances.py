"""`dicode evaluate --videos DIR --reference DIR`: distances of two folders of videos."""

import argparse
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dicode_jax.cli import video
from dicode_jax.cli.evaluate_arguments import DISTANCES
from dicode_jax.errors import UserError

KEPT = ".npz"  # as a suite keeps its videos


def files_of(folder: str) -> list[pathlib.Path]:
    """The videos of a folder, those below it too, in order of their names.

    Hidden ones and those of a stopped command, `*.part.*`, are not among them.

    Raises:
      UserError: There are none.
    """
    from dicode_jax.data.records import VIDEO_SUFFIXES
    from dicode_jax.media import writer

    if not pathlib.Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}")
    known, root = {*VIDEO_SUFFIXES, *writer.VIDEO_SUFFIXES, KEPT}, pathlib.Path(folder)
    found = [
        path
        for path in root.rglob("*")
        if path.suffix.lower() in known
        and not path.stem.endswith(".part")
        and not any(name.startswith(".") for name in path.relative_to(root).parts)
    ]
    if not found:
        raise UserError(f"{folder} holds no videos")
    return sorted(found)


def networks_of(
    args: argparse.Namespace, wanted: Callable[[str], bool], *, is_default: bool
) -> list[Any]:
    """The networks that the options name, of which a distance is wanted.

    Args:
      is_default: Whether the packaged classifier is one where none is named.

    Raises:
      UserError: One is broken, or a distance is wanted whose network is not named.
    """
    from dicode_jax.evaluation import networks

    named: list[tuple[str, Callable[[Any], Any]]] = [
        ("i3d", networks.i3d),
        ("inception", networks.inception),
        ("features", lambda folder: networks.shapes(folder or None)),
    ]
    found = [make(getattr(args, x)) for x, make in named if getattr(args, x) is not None]
    if not found and is_default:
        found = [networks.shapes()]
    names = [name for network in found for name in network.names]
    for metric in args.metrics or ():
        if metric in DISTANCES and metric not in map(str.lower, names):
            what = f"those given measure {', '.join(names)}" if names else "none is given"
            option = {"v": "--i3d", "i": "--inception", "-": "--features"}[_kind(metric)]
            raise UserError(f"--metrics {metric} is of another network ({what}); it is of {option}")
    return [network for network in found if any(map(wanted, network.names))]


def _kind(metric: str) -> str:
    return "-" if "-" in metric else metric[1]


def told(network: Any) -> dict[str, Any]:
    """The protocol of a network's distances, for the settings of a report."""
    from dicode_jax.evaluation import distribution

    label = ", ".join(network.names)
    return {f"{label}: {key}": x for key, x in distribution.protocol(network).items()}


def clips_of(
    paths: Sequence[pathlib.Path], network: Any, progress: Callable, rates: set[float]
) -> Iterator[Any]:
    """The clip of each file that goes through a network; frames a second are added to `rates`.

    Without a rate of the network's own it is of the file's first frames, none left out or twice.

    Raises:
      UserError: A file cannot be read or is too short, or its rate is not that of those before.
    """
    from dicode_jax.evaluation.kept import read_kept
    from dicode_jax.media.video import iter_frames, iter_frames_at, probe

    for i, path in enumerate(paths):
        progress(f"videos for {network.name}", i, len(paths))
        if path.suffix.lower() == KEPT:
            frames, fps = read_kept(path)
            if fps is None:
                raise UserError(
                    f"{path} does not say how many frames a second it has, as those of earlier "
                    "versions; evaluate the model once more, into another folder"
                )
            rates.add(round(fps, 3))
        else:
            fps = network.fps or probe(path).fps
            if not fps:
                raise UserError(f"{path} does not say how many frames a second it has; give --fps")
            rates.add(round(fps, 3))
            shown = iter_frames(path) if network.fps is None else iter_frames_at(path, fps)
            frames = [frame.image for frame in itertools.islice(shown, network.num_frames)]
        if network.fps is None and len(rates) > 1:
            raise UserError(
                f"the videos have {' and '.join(f'{x:g}' for x in sorted(rates))} frames a second, "
                "and what moves twice as fast is another distribution; give --fps"
            )
        yield network.clip(frames, fps, path)
    progress(f"videos for {network.name}", len(paths), len(paths))


def compare(args: argparse.Namespace, wanted: Callable[[str], bool]) -> Any:
    """The report of the distances of the videos of one folder from those of another.

    Raises:
      UserError: The folders do not hold equally many, or one cannot be read.
    """
    from dicode_jax.evaluation import distribution, networks, report

    first, second = files_of(args.videos), files_of(args.reference)
    distribution.check_counts(len(first), len(second))
    values: dict[str, float] = {}
    settings: dict[str, Any] = {
        "videos": args.videos,
        "reference": args.reference,
        "count of each": len(first),
        "seed": "none: nothing is drawn",
    }
    for network in networks_of(args, wanted, is_default=True):
        if network.fps is None and args.fps is not None:
            network = dataclasses.replace(network, fps=args.fps)
        rates: set[float] = set()
        with video.progress_bar() as progress:
            one, other = (network(clips_of(x, network, progress, rates)) for x in (first, second))
        values |= distribution.between(network, one, other, wanted)
        settings |= told(network)
        if network.fps is None:
            settings[f"{', '.join(network.names)}: frames a second"] = rates.pop()
    return report.Report(
        title="How far apart are two sets of videos?",
        settings=settings,
        values=values,
        notes={name: note for name, note in networks.NOTES.items() if name in values},
    )
