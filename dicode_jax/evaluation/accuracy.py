"""How often the clips of a model obey their captions, by the judge of the shapes world.

Captions are of the test split, whose combinations of colour, shape and motion no training saw, and
of a row of scenes on which nothing has been chosen.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from dicode_jax.data import shapes_world
from dicode_jax.evaluation import shapes
from dicode_jax.evaluation.intervals import Interval, interval
from dicode_jax.evaluation.report import Plot

ROW = 9000  # number of the row of scenes; samplings were chosen on rows from 1000 on
NOTES = {
    "color, shape, motion, background, size": "share of clips that show what the caption says, as "
    "the classical judge `dicode_jax.evaluation.shapes` reads the whole clip",
    "all": "share of clips of which all five are right",
    "shape in every frame": "share of clips whose every single frame, read by itself, shows the "
    "shape that the caption says; the other three likewise",
    "all, and in every frame": "share of clips of which all five are right, and in every single "
    "frame colour, shape, background and size",
    "object seen": "share of frames that show an object at all; what wobbles and drifts is told of "
    "these alone",
    "color wobble": "standard deviation over the frames of the object's colour, of 255, mean of "
    "the channels; 0 in drawn clips",
}


def scenes(count: int, seed: int = 0) -> list[shapes_world.Scene]:
    """The scenes of the test split that evaluations with this seed are of."""
    return [shapes_world.scene_at(ROW + seed, i, "test") for i in range(count)]


def seeds(count: int, seed: int = 0) -> list[int]:
    """The seeds that clips of `scenes` are painted with."""
    return [1_000_000 * (seed + 1) + i for i in range(count)]


def judged(
    said: shapes_world.Attributes, clip: UInt8[np.ndarray, "f h w 3"]
) -> dict[str, bool | float]:
    """What a clip shows right: a row for `summary`."""
    verdict = shapes.judge(clip)
    matches, steady = verdict.matches(said), verdict.steady(said)
    whole = all(matches.values())
    return (
        matches
        | {"all": whole}
        | {f"{field} in every frame": right for field, right in steady.items()}
        | {"all, and in every frame": whole and all(steady.values())}
        | {"object seen": float(np.isfinite(verdict.frames.x).mean())}
        | {"color wobble": verdict.frames.wobble}
    )


def summary(rows: Sequence[dict[str, bool | float]]) -> dict[str, Interval]:
    """Means of rows of `judged` with their intervals.

    Raises:
      ValueError: There are none.
    """
    if not rows:
        raise ValueError("nothing to score")
    return {name: interval(row[name] for row in rows) for name in rows[0]}


def plots(
    said: Sequence[shapes_world.Attributes], rows: Sequence[dict[str, bool | float]]
) -> list[Plot]:
    """Shares of attributes, and those of each word: how many of its clips are right in all."""
    found = summary(rows)
    shares = {name: x for name, x in found.items() if name != "color wobble"}
    drawn = [
        Plot(
            name="attributes",
            title="clips that show what their captions say",
            x_label="",
            y_label="share",
            x=list(shares),
            lines={"share": list(shares.values())},
        )
    ]
    for field in shapes.FIELDS:
        words = sorted({getattr(one, field) for one in said})
        of_words = {
            measure: [
                interval(r[measure] for s, r in zip(said, rows) if getattr(s, field) == word)
                for word in words
            ]
            for measure in (field, "all", "all, and in every frame")
        }
        drawn.append(
            Plot(
                name=f"by_{field}",
                title=f"clips that are right, by {field}",
                x_label=field,
                y_label="share",
                x=words,
                lines=of_words,
            )
        )
    return drawn
