"""What each deep token of a keyframe carries: sweeps that take tokens away, ways between videos.

A token that is taken away becomes the mean of its place over the set, which says nothing of any
one video (the original's figure sweeps over kept tokens likewise).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from dicode_jax.evaluation.intervals import interval
from dicode_jax.evaluation.report import Plot
from dicode_jax.evaluation.shapes import FIELDS

Tokens = Float[np.ndarray, "b k n z"]
NOTES = {
    "without token i": "token i of both keyframes is the mean of its place over the set",
    "first i tokens": "all others are such means",
    "squared error": "from what all tokens paint from the same noise",
    "color, shape, motion, background, size": "share of clips that still show the caption's words",
}


def without(tokens: Tokens, place: int) -> Tokens:
    """Tokens whose one at `place` is the mean over videos and keyframes."""
    found = tokens.copy()
    found[:, :, place] = tokens[:, :, place].mean((0, 1))
    return found


def first(tokens: Tokens, count: int) -> Tokens:
    """Tokens of which all but the first `count` are the means of their places."""
    found = np.broadcast_to(tokens.mean((0, 1)), tokens.shape).copy()
    found[:, :, :count] = tokens[:, :, :count]
    return found


def between(
    one: Float[np.ndarray, "k n z"], other: Float[np.ndarray, "k n z"], count: int
) -> Float[np.ndarray, "c k n z"]:
    """Tokens on the straight way from one video to another, both ends among them."""
    share = np.linspace(0, 1, count, dtype=one.dtype)[:, None, None, None]
    return (1 - share) * one + share * other


def nearest(tokens: Tokens, count: int) -> Int[np.ndarray, "b c"]:
    """The numbers of the videos whose tokens are nearest to those of each, itself left out."""
    flat = tokens.reshape(len(tokens), -1).astype(np.float64)
    apart = np.square(flat[:, None] - flat[None]).sum(-1)
    np.fill_diagonal(apart, np.inf)
    return np.argsort(apart, axis=1, kind="stable")[:, :count]


def plots(sweeps: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> list[Plot]:
    """Two plots of each sweep, whose rows are those of one place for each video."""
    drawn = []
    for name, places in sweeps.items():
        lines = {
            field: [interval(row[field] for row in rows) for rows in places]
            for field in (*FIELDS, "squared error")
        }
        error = {"squared error": lines.pop("squared error")}
        for what, held in (("words", lines), ("error", error)):
            drawn.append(
                Plot(
                    name=f"{name.replace(' ', '_')}_{what}",
                    title=f"{name}: {what}",
                    x_label="token" if name.startswith("without") else "tokens",
                    y_label="share right" if what == "words" else "squared error, of 255^2",
                    x=list(range(1, len(places) + 1)),
                    lines=held,
                )
            )
    return drawn
