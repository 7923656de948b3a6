"""How a long video of the shapes world holds together: borders of clips, drift, and motion.

A drawn video is a triangle wave that turns at the keyframes: what moves left in clip 0 comes back
in clip 1, and everything is as it was after two clips (after five, of what moves in a circle).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dicode_jax.data import shapes_world
from dicode_jax.evaluation import shapes
from dicode_jax.evaluation.intervals import Interval, interval
from dicode_jax.evaluation.report import Plot

SECONDS = shapes_world.NUM_FRAMES / shapes_world.FPS  # of a clip
PER_MINUTE = round(60 / SECONDS)
BACK = {
    "moves left": "moves right",
    "moves up": "moves down",
    "grows": "shrinks",
}
BACK |= {back: there for there, back in BACK.items()}
RIGHT = ("color", "shape", "background", "size", "motion")
SEEN = "object seen"
DRIFTS = ("color drift", "size drift", "place drift")
NOTES = {
    "border ratio": "mean absolute difference of the two frames at a border of clips, by that of "
    "neighbouring frames within clips; 0 in drawn videos, where a clip begins with the frame that "
    "the last one ended with",
    "color, shape, background in the last clip": "share of videos whose last clip shows all three "
    "as the caption says",
    "color, shape, background, size, motion": "share of clips that show what the triangle wave "
    "asks for at their place, mean over videos",
    "object seen": "share of frames that show an object at all; drift is told of the clips alone "
    "in which it is seen",
    "color drift": "distance, of 255, of the object's mean colour from that in the first clip",
    "size drift": "how far the radius at a clip's start is off what it was a period ago at the "
    "video's start, as a share of it",
    "place drift": "the same of the place, in units of a world of 64 x 64",
}


def motion_at(motion: str, clip: int) -> str:
    """What the triangle wave of a caption's motion does in a clip."""
    return BACK.get(motion, motion) if clip % 2 else motion


def period(motion: str) -> int:
    """Clips after which everything is as it was."""
    return 5 if motion == "moves in a circle" else 2


def border_ratio(video: UInt8[np.ndarray, "t h w 3"], starts: Sequence[int]) -> float:
    """Steps onto the frames of these numbers by other steps; NaN where nothing else changes.

    Raises:
      ValueError: No start is a frame behind another one, or no frame is no start.
    """
    steps = np.array([np.abs(b.astype(np.int16) - a).mean() for a, b in itertools.pairwise(video)])
    is_border = np.isin(np.arange(1, len(video)), starts)
    if not is_border.any() or is_border.all():
        raise ValueError(
            f"want two clips of two frames or more, got {len(video)} frames that clips start "
            f"with at {[0, *starts]}"
        )
    within = steps[~is_border].mean()
    return float(steps[is_border].mean() / within) if within else float("nan")


def measured(
    said: shapes_world.Attributes,
    video: UInt8[np.ndarray, "t h w 3"],
    num_frames: int,
    starts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Numbers of a video: `border ratio`, and of each clip in `clips` what is right and drift.

    Args:
      num_frames: Of a clip of the world, two seconds; what is left behind the last one is not
        judged.
      starts: Where a model's own clips start behind the first; None where those of the world do.
    """
    if starts is None:
        starts = range(num_frames, len(video), num_frames)
    count = len(video) // num_frames
    clips = video[: count * num_frames].reshape(count, num_frames, *video.shape[1:])
    verdicts = [shapes.judge(clip) for clip in clips]
    firsts = [verdict.frames for verdict in verdicts]
    rows = []
    for i, verdict in enumerate(verdicts):
        row: dict[str, Any] = dict(verdict.matches(said))
        row["motion"] = verdict.motion == motion_at(said.motion, i)
        row[SEEN] = float(np.isfinite(verdict.frames.x).mean())
        then, now = firsts[i % period(said.motion)], firsts[i]
        row["color drift"] = float(np.linalg.norm(_mean(now.rgb) - _mean(firsts[0].rgb)))
        row["size drift"] = float(abs(now.radius[0] / then.radius[0] - 1))
        row["place drift"] = float(np.hypot(now.x[0] - then.x[0], now.y[0] - then.y[0]))
        rows.append(row)
    return {"border ratio": border_ratio(video, starts), "clips": rows}


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """Means over videos of `measured`, with intervals; drift for each minute by itself."""
    said = ("color", "shape", "background")
    values = {"border ratio": interval(video["border ratio"] for video in found)}
    values["color, shape, background in the last clip"] = interval(
        all(bool(video["clips"][-1][name]) for name in said) for video in found
    )
    for name in (*RIGHT, SEEN):
        values[name] = interval(float(np.mean([c[name] for c in v["clips"]])) for v in found)
    num_clips = len(found[0]["clips"])
    for minute in range(-(-num_clips // PER_MINUTE)):
        within = slice(minute * PER_MINUTE, (minute + 1) * PER_MINUTE)
        for name in (*RIGHT[:4], SEEN, *DRIFTS):
            values[f"{name}, minute {minute + 1}"] = interval(
                _mean(np.array([float(clip[name]) for clip in video["clips"][within]]))
                for video in found
            )
    return values


def plots(found: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """What is right, and drift, over the length of the videos."""
    times = [SECONDS * i for i in range(len(found[0]["clips"]))]

    def over_time(name: str) -> list[Interval]:
        rows = zip(*(video["clips"] for video in found), strict=True)
        return [interval(clip[name] for clip in clips) for clips in rows]

    right = Plot(
        name="right_over_time",
        title="clips that show what they should",
        x_label="seconds",
        y_label="share",
        x=times,
        lines={name: over_time(name) for name in RIGHT},
    )
    drifts = [
        Plot(
            name=name.replace(" ", "_"),
            title=name,
            x_label="seconds",
            y_label=name,
            x=times,
            lines={name: over_time(name)},
        )
        for name in DRIFTS
    ]
    return [right, *drifts]


def _mean(values: np.ndarray) -> Any:
    """Along the first axis, without what is not finite; NaN where nothing is left."""
    kept = values[np.isfinite(values).reshape(len(values), -1).all(axis=1)]
    return kept.mean(axis=0) if len(kept) else np.full(values.shape[1:], np.nan)
