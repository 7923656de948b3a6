"""Looks through a data set: what is in it, how long, how large, what cannot be read."""

import collections
import dataclasses
import itertools
import os
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from dicode_jax.data import clips
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import BrokenRecord, ClipSource, Record
from dicode_jax.data.shapes_world import Scene
from dicode_jax.data.sources.open import kind_of, open_source
from dicode_jax.errors import printable
from dicode_jax.media.video import contact_sheet

SHEET_ROWS, SHEET_COLUMNS, SHEET_HEIGHT = 16, 8, 112
SCENES = 100  # of the synthetic world, which has no end
_BAR = 30
_LENGTHS = (1, 2, 5, 10, 20, 60, 300)  # seconds
_WORDS = (1, 5, 10, 20, 40, 80)


@dataclasses.dataclass(kw_only=True)
class Inspection:
    """What was found.

    Attributes:
      cfg: The settings it was read with.
      kind: What `cfg.path` is.
      num_records: How many there are; `num_read` of them were looked at.
      num_held_out: Those that `validation` holds out.
      left_out: What was found and is no record, a line each.
      videos, pictures: What was read, by name, in order.
      words: Of each caption of every record whose captions could be read.
      broken: Why a record cannot be read, by name.
      sheet: Frames uint8 [f, h, w, 3] and a label of some records.
    """

    cfg: DataConfig
    kind: str
    num_records: int
    num_held_out: int
    left_out: tuple[str, ...]
    num_read: int = 0
    videos: dict[str, clips.MediaInfo] = dataclasses.field(default_factory=dict)
    pictures: dict[str, clips.MediaInfo] = dataclasses.field(default_factory=dict)
    words: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    broken: dict[str, str] = dataclasses.field(default_factory=dict)
    sheet: list[tuple[str, np.ndarray]] = dataclasses.field(default_factory=list)


def inspect(
    cfg: DataConfig,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Inspection:
    """Reads the packets and two frames of every record, or of `limit` of them, evenly spread.

    Raises:
      UserError: There is no such data set.
    """
    source = open_source(cfg, split="all")
    kind = kind_of(cfg)
    if kind == "shapes":
        limit = min(limit or SCENES, len(source))
        num_held_out = 0
    else:
        num_held_out = len(open_source(cfg, split="validation")) if cfg.validation else 0
    found = Inspection(
        cfg=cfg,
        kind=kind,
        num_records=len(source),
        num_held_out=num_held_out,
        left_out=source.left_out,
    )
    chosen = _spread(len(source), limit)
    shown = {chosen[i] for i in _spread(len(chosen), SHEET_ROWS)}
    for done, index in enumerate(chosen, start=1):
        _look(found, source, index, index in shown)
        progress(done, len(chosen))
    found.num_read = len(chosen)
    return found


def report(found: Inspection) -> list[str]:
    """The inspection in lines of text."""
    cfg, durations = found.cfg, [info.duration for info in found.videos.values()]
    read = "" if found.num_read == found.num_records else f", {found.num_read:,} of them read"
    lines = [f"{cfg.path}: {found.kind.replace('_', ' ')}, {found.num_records:,} records{read}"]
    lines += _row("held out", f"{found.num_held_out:,}") if found.num_held_out else []
    lines += _row("videos", f"{len(found.videos):,}")
    lines += _row("pictures", f"{len(found.pictures):,}") if found.pictures else []
    if durations:
        middle = statistics.median(durations)
        lines += _row(
            "lengths", f"{min(durations):.1f} to {max(durations):.1f} s, median {middle:.1f} s"
        )
        lines += _histogram(durations, _LENGTHS, "s")
        lines += _row("too short", _too_short(found))
    lines += _row("sizes", _sizes(found))
    lines += _captions(found)
    lines += _row("broken", f"{len(found.broken):,}")
    lines += [f"  {printable(reason, 500)}" for reason in found.broken.values()]
    if found.left_out:
        lines += ["left out", *(f"  {line}" for line in found.left_out)]
    return [printable(line) for line in lines]


def write_sheet(path: str | os.PathLike, found: Inspection) -> None:
    """Writes a picture with a row of frames and the caption of records all over the data set."""
    labels, rows = zip(*found.sheet, strict=True)
    contact_sheet(path, rows, labels=labels, columns=SHEET_COLUMNS, cell_size=SHEET_HEIGHT)


def _look(found: Inspection, source: ClipSource, index: int, show: bool) -> None:
    name = None
    try:
        record = source.record(index)
        name = record.name
        found.words[name] = tuple(len(caption.split()) for caption in record.captions)
        if isinstance(record.media, Scene):
            info = clips.MediaInfo(width=64, height=64, num_frames=16, duration=2.0)
        else:
            info = clips.probe(record)
        (found.pictures if record.is_image else found.videos)[name] = info
        if show:
            found.sheet.append((_label(record), clips.read_overview(record, SHEET_COLUMNS)))
    except BrokenRecord as error:
        found.broken[name or f"record {index}"] = str(error)


def _label(record: Record) -> str:
    caption = printable(record.captions[0], 200) if record.captions else "(no caption)"
    return f"{printable(record.name, 100)}: {caption}"


def _spread(count: int, limit: int | None) -> list[int]:
    """`limit` different indices below `count`, evenly spaced and in order."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def _row(name: str, text: str) -> list[str]:
    return [f"{name:<12}{text}"]


def _histogram(values: Sequence[float], edges: Sequence[int], unit: str) -> list[str]:
    """A line per interval between the edges that holds something."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    bounds = [
        f"below {edges[0]} {unit}",
        *(f"{a} to {b} {unit}" for a, b in itertools.pairwise(edges)),
        f"{edges[-1]} {unit} and more",
    ]
    return [
        f"  {bound:<18}{'#' * max(1, round(_BAR * count / max(counts))):<{_BAR}} {count:,}"
        for bound, count in zip(bounds, counts)
        if count
    ]


def _too_short(found: Inspection) -> str:
    """How many videos hold less than a clip, and how many so little that they are refused."""
    cfg, short, refused = found.cfg, 0, 0
    for info in found.videos.values():
        there = clips.frames_there(info, cfg)
        short += there < cfg.num_frames
        refused += there < cfg.min_clip * cfg.num_frames
    rate = f"{cfg.fps:g} a second" if cfg.fps else f"every {cfg.frame_stride}."
    return f"{short:,} for {cfg.num_frames} frames, {rate}; {refused:,} of them refused"


def _sizes(found: Inspection) -> str:
    every = [*found.videos.values(), *found.pictures.values()]
    counts = collections.Counter(f"{info.width} x {info.height}" for info in every)
    shown = [f"{size} ({count:,})" for size, count in counts.most_common(5)]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f", {more:,} others" if more > 0 else "") or "none"


def _captions(found: Inspection) -> list[str]:
    words = [count for captions in found.words.values() for count in captions]
    without = sum(not captions for captions in found.words.values())
    several = sum(len(captions) > 1 for captions in found.words.values())
    text = f"{len(words):,}; {without:,} records without, {several:,} with several"
    if not words:
        return _row("captions", text)
    middle = statistics.median(words)
    text += f"; {min(words)} to {max(words)} words, median {middle:g}"
    return [*_row("captions", text), *_histogram(words, _WORDS, "words")]
