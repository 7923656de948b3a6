"""Which clips of a data set are worth learning: measured, judged, and listed for captions.

    videos = videos_of(DataConfig(path="clips"))
    measured = measure_all(videos, "clips/filter.jsonl")
    verdicts = judge(measured, FilterConfig(min_light=0.1))

Measures are of eight frames, from the first to the last, at most 240 pixels high. They are kept in
the report, so that other bounds need no second look at the files.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dicode_jax.data import clips
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import BrokenRecord, MediaFile, Record, suffix_of
from dicode_jax.data.sources.folder import files_below
from dicode_jax.data.sources.open import kind_of, open_source
from dicode_jax.errors import UserError, printable
from dicode_jax.storage.files import MAX_TEXT, atomic_path, make_folder, parse_json, resolve_output

REASONS = ("broken", "still", "dark", "text", "duplicate")
HASH_BITS = 3 * 64
MAX_DISTANCE = 11  # of `near`, whose 12 parts of a hash then cannot all differ

_LONGEST_LINE = MAX_TEXT
_FRAMES, _HEIGHT = 8, 240
_CELL, _RUN = 8, 4  # pixels of a cell; as many dense ones side by side are a piece of a line
_EDGE, _DENSE = 60, 0.25  # grey levels between two pixels; share of a cell that is edges
_SMALL = (64, 36)  # motion is looked for at this size, where the noise of a camera is gone


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What is kept.

    Attributes:
      min_motion: Least `Measured.motion`.
      min_light: Least `Measured.light`.
      max_text: Most `Measured.text`.
      max_distance: Bits of 192 in which the hashes of two videos that count as one may differ, 0 to
        `MAX_DISTANCE`.
    """

    min_motion: float = 0.005
    min_light: float = 0.08
    max_text: float = 0.01
    max_distance: int = 8

    def __post_init__(self):
        for name in ("min_motion", "min_light", "max_text"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if not 0 <= self.max_distance <= MAX_DISTANCE:
            raise UserError(f"max_distance must lie in 0..{MAX_DISTANCE}, got {self.max_distance}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What has been measured of a video.

    Attributes:
      video: Its name in the data set.
      bytes, modified: Of its file, the latter in nanoseconds; by these it is known again.
      motion: Mean difference between neighbours of the eight frames, where brightness is 0 to 1;
        the median over them.
      light: Mean brightness of all frames, 0 to 1.
      text: Share of the picture that looks like lines of text: runs of four cells of 8 x 8 pixels
        or more, a quarter of whose pixels are sharp edges in at least half of the frames.
      hash: `HASH_BITS` in hexadecimal: perceptual hashes of three of the frames.
      broken: Why it cannot be read; then nothing else is known.
    """

    video: str
    bytes: int
    modified: int
    motion: float = 0.0
    light: float = 0.0
    text: float = 0.0
    hash: str = ""
    broken: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A video, and why it is left out, by `REASONS`; it is kept where there is no reason."""

    measured: Measured
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_kept(self) -> bool:
        return not self.reasons


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """A video of the data set: its name, file, and captions, or why these cannot be read."""

    name: str
    path: str
    captions: tuple[str, ...] = ()
    broken: str = ""


def videos_of(cfg: DataConfig) -> list[Video]:
    """The videos of a folder or a table, by name.

    Raises:
      UserError: It is neither, or holds none.
    """
    if (kind := kind_of(cfg)) not in ("folder", "table"):
        raise UserError(f"{cfg.path} is of the kind {kind}; give a folder or a table of videos")
    source = open_source(cfg, split="all", images=False)
    found = []
    for index in range(len(source)):
        try:
            record = source.record(index)
        except BrokenRecord as error:
            name = source.name(index)
            found.append(Video(name=name, path="", broken=printable(error, 500)))
            continue
        if isinstance(record.media, MediaFile) and not record.is_image:
            found.append(Video(name=record.name, path=record.media.path, captions=record.captions))
    return sorted(found, key=lambda video: video.name)


def measure_all(
    videos: Sequence[Video],
    report: str | os.PathLike,
    *,
    tell: Callable[[int, int], Any] = lambda done, total: None,
) -> list[Measured]:
    """Measures videos, but for those that the report has as they are; adds a line for each.

    Raises:
      UserError: ImageHash is not installed, or the report is something else or cannot be written.
    """
    phash = _phash()
    (known, whole), found = _read_report(report), []
    try:
        with open(report, "a", encoding="utf-8") as file:
            file.truncate(whole)
            for done, video in enumerate(videos):
                tell(done, len(videos))
                measured = known.get(video.name)
                if measured is None or _identity(video.path) != (measured.bytes, measured.modified):
                    measured = measure(video, phash)
                    file.write(json.dumps(dataclasses.asdict(measured)) + "\n")
                    file.flush()
                found.append(measured)
    except OSError as error:
        raise UserError(f"cannot write {report}: {error.strerror}") from error
    tell(len(videos), len(videos))
    return found


def measure(video: Video, phash: Callable[[Image.Image], Any] | None = None) -> Measured:
    """Measures one video.

    Args:
      phash: ImageHash's function of this name, if it has been imported.
    """
    phash = phash or _phash()
    num_bytes, modified = _identity(video.path)
    facts = {"video": video.name, "bytes": num_bytes, "modified": modified}
    suffix = suffix_of(video.path)
    record = Record(name=video.name, captions=(), media=MediaFile(path=video.path, suffix=suffix))
    if video.broken:
        return Measured(**facts, broken=video.broken)
    try:
        frames = clips.read_overview(record, _FRAMES, _HEIGHT, enlarge=False)
    except BrokenRecord as error:
        return Measured(**facts, broken=printable(error, 500))
    pictures = [Image.fromarray(frame).convert("L") for frame in frames]
    greys = np.stack([np.asarray(picture) for picture in pictures])
    quarters = [pictures[len(pictures) * i // 4] for i in (1, 2, 3)]
    bits = np.concatenate([phash(picture).hash.ravel() for picture in quarters])
    return Measured(
        **facts,
        motion=round(_motion(pictures), 5),
        light=round(float(greys.mean()) / 255, 4),
        text=round(text_share(greys), 4),
        hash=np.packbits(bits).tobytes().hex(),
    )


def text_share(greys: UInt8[np.ndarray, "f h w"]) -> float:
    """Share of a picture that looks like lines of text; see `Measured.text`."""
    levels: Any = greys.astype(np.int16)
    across = np.abs(np.diff(levels, axis=2))[:, :-1]
    down = np.abs(np.diff(levels, axis=1))[:, :, :-1]
    f, h, w = across.shape
    edges = np.maximum(across, down) > _EDGE
    rows, columns = h // _CELL, w // _CELL
    if rows < 1 or columns < _RUN:
        return 0.0
    cells = edges[:, : rows * _CELL, : columns * _CELL].reshape(f, rows, _CELL, columns, _CELL)
    dense = np.median(cells.mean(axis=(2, 4)), axis=0) > _DENSE  # [rows, columns]
    runs = np.lib.stride_tricks.sliding_window_view(dense, _RUN, axis=1).all(axis=2)
    lines = np.zeros_like(dense)
    for shift in range(_RUN):
        lines[:, shift : shift + columns - _RUN + 1] |= runs
    return float(lines.mean())


def judge(measured: Sequence[Measured], cfg: FilterConfig) -> list[Verdict]:
    """A verdict on each video; of those that are one, the first that is kept stays."""
    kept = _Near(cfg.max_distance)
    verdicts = []
    for one in measured:
        reasons = {"broken": one.broken} if one.broken else _reasons(one, cfg)
        if not reasons and (other := kept.find(one)):
            reasons = {"duplicate": f"of {other}"}
        if not reasons:
            kept.add(one)
        verdicts.append(Verdict(measured=one, reasons=reasons))
    return verdicts


def write_report(path: str | os.PathLike, verdicts: Sequence[Verdict]) -> None:
    """A line of JSON for each video: what was measured, whether it is kept, and why not."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for verdict in verdicts:
            judged = {"kept": verdict.is_kept, "reasons": verdict.reasons}
            file.write(json.dumps(dataclasses.asdict(verdict.measured) | judged) + "\n")


def link_all(videos: Sequence[Video], out: str | os.PathLike) -> int:
    """Gives files a second name in a folder, under their names in the data set; copies elsewhere.

    A hard link takes no room. Another file system gets a copy, which appears when it is whole.

    Returns:
      How many were not there yet.

    Raises:
      UserError: Something is in the way, or cannot be written; nothing is replaced.
    """
    out, count = make_folder(out), 0
    wanted = {os.path.normpath(video.name): video for video in videos}
    if outside := [name for name in wanted if os.path.isabs(name) or name.split(os.sep)[0] == ".."]:
        raise UserError(f"{outside[0]} lies outside of the data set: it has no name in {out}")
    try:
        there = [os.path.normpath(name) for name in files_below(str(out), None)[0]]
        if other := sorted(set(there) - set(wanted)):
            raise UserError(f"{out} holds {other[0]}, which is not kept; name a new folder")
        for name, video in wanted.items():
            target = out / name
            if os.path.lexists(target):
                if not _is_same(video.path, target):
                    raise UserError(f"{target} is there and another file; name a new folder")
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(os.path.realpath(video.path), target)
            count += 1
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}") from error
    return count


def _link(source: str, target: pathlib.Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
        found = os.stat(source)
        os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def _is_same(source: str, target: pathlib.Path) -> bool:
    """Whether one is a name or a copy of the other."""
    with contextlib.suppress(OSError):
        return os.path.samefile(source, target) or _identity(source) == _identity(str(target))
    return False


def _reasons(one: Measured, cfg: FilterConfig) -> dict[str, str]:
    found = {}
    if one.motion < cfg.min_motion:
        found["still"] = f"motion {one.motion:g}, want {cfg.min_motion:g}"
    if one.light < cfg.min_light:
        found["dark"] = f"light {one.light:g}, want {cfg.min_light:g}"
    if one.text > cfg.max_text:
        found["text"] = f"on {one.text:g} of the picture, at most {cfg.max_text:g}"
    return found


class _Near:
    """Finds hashes that differ in a few bits: two that do agree in one of twelve parts of both."""

    def __init__(self, max_distance: int):
        self._max_distance = max_distance
        self._videos: list[Measured] = []
        self._places: dict[tuple[int, int], list[int]] = {}

    def add(self, one: Measured) -> None:
        for part in self._parts(one):
            self._places.setdefault(part, []).append(len(self._videos))
        self._videos.append(one)

    def find(self, one: Measured) -> str | None:
        """The name of the first that is near."""
        near = {place for part in self._parts(one) for place in self._places.get(part, ())}
        own = int(one.hash, 16)
        for place in sorted(near):
            if (own ^ int(self._videos[place].hash, 16)).bit_count() <= self._max_distance:
                return self._videos[place].video
        return None

    def _parts(self, one: Measured) -> Iterator[tuple[int, int]]:
        """As many as bits may differ at most, and one more."""
        count = MAX_DISTANCE + 1
        size = HASH_BITS // 4 // count  # hexadecimal digits
        for i in range(count):
            yield i, int(one.hash[i * size : (i + 1) * size], 16)


def _motion(pictures: Sequence[Image.Image]) -> float:
    small = [np.asarray(p.resize(_SMALL, Image.Resampling.BOX), np.float32) for p in pictures]
    steps = [float(np.abs(b - a).mean()) / 255 for a, b in itertools.pairwise(small)]
    return float(np.median(steps)) if steps else 0.0


def _identity(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _read_report(path: str | os.PathLike) -> tuple[dict[str, Measured], int]:
    """What an earlier run has measured, by name, and how many bytes say so: the rest is torn.

    Raises:
      UserError: The file is something else.
    """
    if not os.path.lexists(path):
        return {}, 0
    path = resolve_output(path)
    names = [field.name for field in dataclasses.fields(Measured)]
    found: dict[str, Measured] = {}
    whole = 0
    with open(path, "rb") as file:
        while line := file.readline(_LONGEST_LINE):
            if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
                break  # the end of a run that was killed
            item = parse_json(line, path)
            if not (isinstance(item, dict) and _is_measured(item)):
                raise UserError(f"{path} is no report of `dicode data filter`; name another file")
            found[item["video"]] = Measured(**{name: item[name] for name in names})
            whole += len(line)
    return found, whole


def _is_measured(item: Mapping[str, Any]) -> bool:
    whole = all(isinstance(item.get(name), int) for name in ("bytes", "modified"))
    shares = all(isinstance(item.get(name), int | float) for name in ("motion", "light", "text"))
    texts = all(isinstance(item.get(name), str) for name in ("video", "hash", "broken"))
    if not (whole and shares and texts):
        return False
    return bool(item["broken"] or re.fullmatch(rf"[0-9a-f]{{{HASH_BITS // 4}}}", item["hash"]))


def _phash() -> Callable[[Image.Image], Any]:
    try:
        from imagehash import phash  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f'finding duplicates needs ImageHash: pip install "dicode-jax[data]" ({error})'
        ) from error
    return phash
