"""Films to clips of one scene each: PySceneDetect finds the cuts, what lies between is written.

    done = cut_film("film.mp4", "clips", CutConfig(min_seconds=3))

Beside the clips of `film.mp4` lies `film.scenes.jsonl`: a line that says what was cut and how, then
one for each clip. By it a run that was stopped goes on, and no clip of another film is replaced.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from dicode_jax.errors import UserError
from dicode_jax.media.video import Frame, iter_frames, probe
from dicode_jax.media.writer import VideoWriter
from dicode_jax.storage.files import (
    MAX_OBJECT,
    atomic_path,
    make_folder,
    parse_json,
    read_small,
    short,
    unfinished,
)

_DETECTED_WIDTH = 256  # pixels of what is compared, about as many as PySceneDetect takes
_FASTEST = 1000.0  # frames per second that a video may be written with

Tell = Callable[[str, float, float], Any]
"""``(what, seconds done, seconds in all)``"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutConfig:
    """Where films are cut.

    Attributes:
      threshold: How much hue, saturation and brightness (0 to 255, their mean over all pixels) must
        change from one frame to the next for a cut; PySceneDetect's `ContentDetector`, whose own is
        27.
      min_seconds: Shorter scenes are left out.
      max_seconds: Longer scenes are divided; what is left at their end is one more clip if it is
        long enough.
    """

    threshold: float = 27.0
    min_seconds: float = 2.0
    max_seconds: float = 60.0

    def __post_init__(self):
        if not (math.isfinite(self.threshold) and 0 < self.threshold <= 255):
            raise UserError(f"threshold must be above 0 and at most 255, got {self.threshold}")
        if not (0 <= self.min_seconds <= self.max_seconds < math.inf and self.max_seconds > 0):
            raise UserError(
                "want 0 <= min_seconds <= max_seconds, and max_seconds above 0, got "
                f"{self.min_seconds} and {self.max_seconds}"
            )


class Clip(NamedTuple):
    """A clip of a film: its file, and where it begins and ends there, in seconds."""

    video: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cutting:
    """What has been made of a film.

    Attributes:
      num_scenes: That were found.
      clips: Of all that are long enough.
      num_written: Of them, by this run; the others were there.
    """

    num_scenes: int
    clips: tuple[Clip, ...]
    num_written: int


def cut_film(
    film: str | os.PathLike,
    out: str | os.PathLike,
    cfg: CutConfig | None = None,
    *,
    tell: Tell = lambda what, done, total: None,
) -> Cutting:
    """Writes the scenes of a film as mp4 files without sound, in its size and at its mean rate.

    The whole film is read once for its cuts and, unless all clips are there, once more for them.
    Clips appear when they are whole.

    Args:
      film: Any video file.
      out: A folder, made if need be.
      cfg: Where it is cut.
      tell: Told of progress.

    Raises:
      UserError: PySceneDetect is not installed; the film cannot be read; or `out` holds files that
        are in the way: of another film, or of this one cut otherwise.
    """
    cfg, film = cfg or CutConfig(), pathlib.Path(film)
    detectors = _scenedetect()
    total = probe(film).duration or 0.0  # says what is wrong with the film before all else
    found = film.stat()
    facts = {"film": film.name, "bytes": found.st_size, "modified": found.st_mtime_ns}
    facts |= dataclasses.asdict(cfg)
    stem = short(film.stem.replace(".", "_"))  # names in a tar end at the first dot
    out = make_folder(out)
    listing = out / f"{stem}.scenes.jsonl"
    if os.path.lexists(listing):
        rate, num_scenes, clips = _read(listing, facts)
    else:
        watched = _told(iter_frames(film), total, f"cuts of {film.name}", tell)
        times, end = find_cuts(watched, cfg.threshold, detectors)
        num_scenes = len(times.cuts) + 1
        rate = min(times.rate, _FASTEST)
        clips = [
            Clip(f"{stem}_{_timecode(start)}.mp4", start, stop)
            for start, stop in divide(times.cuts, end, cfg)
        ]
        if taken := [clip.video for clip in clips if os.path.lexists(out / clip.video)]:
            raise UserError(f"{out / taken[0]} is there and not of this film; name another folder")
        _write_listing(listing, facts | {"fps": rate, "scenes": num_scenes}, clips)
    missing = [clip for clip in clips if not os.path.lexists(out / clip.video)]
    for clip in missing:
        for torn in unfinished(out / clip.video):
            torn.unlink(missing_ok=True)
    if missing:
        watched = _told(iter_frames(film), total, f"clips of {film.name}", tell)
        _write_clips(watched, film, out, missing, rate)
    return Cutting(num_scenes=num_scenes, clips=tuple(clips), num_written=len(missing))


class Times(NamedTuple):
    """When scenes begin, in seconds, but for the first; and the mean rate of the frames."""

    cuts: list[float]
    rate: float


def find_cuts(
    frames: Iterator[Frame], threshold: float, scenedetect: types.ModuleType | None = None
) -> tuple[Times, float]:
    """Goes through a film.

    Args:
      frames: Of `media.video.iter_frames`.
      threshold: As in `CutConfig`.
      scenedetect: The module, if it has been imported.

    Returns:
      The cuts, and when the film ends, in seconds.

    Raises:
      UserError: PySceneDetect is not installed, or what `frames` raises.
    """
    scenedetect = scenedetect or _scenedetect()
    # Every cut counts, however soon after another: a scene that is too short is left out, where a
    # filter of flashes would join it to its neighbour and leave a cut within a clip.
    detector: Any = scenedetect.ContentDetector(threshold=threshold, min_scene_len=0)
    times: list[float] = []
    cuts, last = [], None
    for number, frame in enumerate(frames):
        step = max(1, frame.image.shape[1] // _DETECTED_WIDTH)
        small = frame.image[::step, ::step, ::-1].copy()  # BGR, as OpenCV has it
        code = scenedetect.FrameTimecode(number, fps=25.0)  # counts frames; the rate is not asked
        cuts += [times[cut.frame_num] if cut.frame_num < number else frame.time
                 for cut in detector.process_frame(code, small)]  # fmt: skip
        times.append(frame.time)
        last = frame
    assert last is not None  # `iter_frames` gives two frames or an error
    step = (times[-1] - times[0]) / (len(times) - 1)
    end = last.time + min(max(last.duration, step), 2 * step)
    return Times([cut for cut in cuts if 0 < cut < end], 1 / max(step, 1e-6)), end


def divide(cuts: Sequence[float], end: float, cfg: CutConfig) -> list[tuple[float, float]]:
    """Start and end of each clip, in seconds: scenes, long ones in parts, short ones left out."""
    found = []
    for start, stop in itertools.pairwise([0.0, *cuts, end]):
        parts = max(1, math.ceil((stop - start) / cfg.max_seconds - 1e-6))
        bounds = [start + i * cfg.max_seconds for i in range(parts)] + [stop]
        found += [
            (a, b)
            for a, b in itertools.pairwise(bounds)
            if b - a >= cfg.min_seconds - 1e-6 and b > a
        ]
    return found


def _write_clips(
    frames: Iterator[Frame],
    film: pathlib.Path,
    out: pathlib.Path,
    clips: Sequence[Clip],
    rate: float,
) -> None:
    """Writes clips, whose starts ascend; frame i is on screen in the middle of its time."""
    shown, upcoming = next(frames), next(frames, None)
    for clip in clips:
        with VideoWriter(out / clip.video, rate, sources=[film]) as writer:
            for number in range(max(1, round((clip.end - clip.start) * rate))):
                time = clip.start + (number + 0.5) / rate
                while upcoming is not None and upcoming.time <= time:
                    shown, upcoming = upcoming, next(frames, None)
                writer.append([shown.image])


def _told(frames: Iterator[Frame], total: float, what: str, tell: Tell) -> Iterator[Frame]:
    for frame in frames:
        yield frame
        tell(what, frame.time, max(total, frame.time))


def _write_listing(path: pathlib.Path, facts: dict[str, Any], clips: Sequence[Clip]) -> None:
    lines = [json.dumps(item) for item in (facts, *(clip._asdict() for clip in clips))]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _read(path: pathlib.Path, facts: dict[str, Any]) -> tuple[float, int, list[Clip]]:
    """What an earlier run has found: rate, number of scenes, clips.

    Raises:
      UserError: It was another film, or cut otherwise; or the file is damaged.
    """
    items = [parse_json(line, path) for line in read_small(path, MAX_OBJECT).splitlines()]
    damaged = UserError(f"{path} is damaged; remove it and the clips that it names")
    try:
        head = items[0]
        other = [name for name in facts if head[name] != facts[name]]
        clips = [Clip(str(x["video"]), float(x["start"]), float(x["end"])) for x in items[1:]]
        rate, num_scenes = float(head["fps"]), int(head["scenes"])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise damaged from error
    if other:
        raise UserError(
            f"{path} is of another cutting: {other[0]} was {head[other[0]]}, is {facts[other[0]]}; "
            "name another folder"
        )
    longest = facts["max_seconds"] + 0.01
    if not all(
        os.path.basename(video) == video and 0 <= start < end < start + longest
        for video, start, end in clips
    ):
        raise damaged
    return rate, num_scenes, clips


def _timecode(seconds: float) -> str:
    """Such as 01h02m03s456, which sorts and has no dot."""
    ms = round(seconds * 1000)
    minutes, hours = ms // 60_000, ms // 3_600_000
    return f"{hours:02d}h{minutes % 60:02d}m{ms // 1000 % 60:02d}s{ms % 1000:03d}"


def _scenedetect() -> types.ModuleType:
    try:
        import scenedetect  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f'cutting films needs PySceneDetect: pip install "dicode-jax[data]" ({error})'
        ) from error
    return scenedetect
