"""How near clips come to the true ones when a model takes them apart and paints them again.

A model that sees keyframes alone is held against repeating them; one that codes every frame,
against a thumbnail that is written down in as many numbers.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from dicode_jax.evaluation.intervals import Interval, interval, of_means
from dicode_jax.evaluation.quality import decibels, similarities, squared_errors
from dicode_jax.evaluation.report import Plot
from dicode_jax.media.resize import resize_square

Clip = UInt8[np.ndarray, "f h w 3"]
Distances = Callable[[Clip, Clip], Float[np.ndarray, " f"]]  # such as LPIPS's, of each frame

NOTES = {
    "psnr": "peak signal-to-noise ratio in dB of the error of all clips together; its interval is "
    "that of the mean error. A mean of decibels would be infinite for what stands still, which "
    "repeating does without fault",
    "mean psnr of clips": "the mean of the decibels of each clip",
    "ssim": "structural similarity (Wang et al., 2004), Gaussian window of 11 x 11, mean of frames",
    "lpips": "perceptual distance by VGG-16 (Zhang et al., 2018), mean of frames",
    "floor": "the same of what needs no model",
}


def repeated(clip: Clip) -> Clip:
    """A clip's first frame for its first half, its last frame for the other."""
    half = len(clip) // 2
    return np.concatenate([np.repeat(clip[:1], half, 0), np.repeat(clip[-1:], len(clip) - half, 0)])


def thumbnails(clip: Clip, numbers: int) -> Clip:
    """Each frame as the largest square thumbnail of at most so many numbers, made large again."""
    size, side = clip.shape[1], max(int(np.sqrt(numbers / 3)), 1)
    box = (0.0, 0.0, float(size), float(size))
    whole = (0.0, 0.0, float(side), float(side))
    frames = []
    for frame in clip:
        small = np.clip(np.round(resize_square(frame, side, box, antialias=True)), 0, 255)
        large = resize_square(small.astype(np.uint8), size, whole, antialias=True)
        frames.append(np.clip(np.round(large), 0, 255).astype(np.uint8))
    return np.stack(frames)


def measured(
    true: Clip, other: Clip, distances: Distances | None = None
) -> dict[str, Float[np.ndarray, " f"]]:
    """Numbers of each frame of a clip.

    Raises:
      ValueError: The clips are of different shapes, or of frames under 11 x 11 pixels.
    """
    if true.shape != other.shape:
        raise ValueError(f"clips of {true.shape} and {other.shape} cannot be compared")
    found = {"squared error": squared_errors(true, other), "ssim": similarities(true, other)}
    return found if distances is None else found | {"lpips": distances(true, other)}


def summary(rows: Sequence[Mapping[str, Float[np.ndarray, " f"]]]) -> dict[str, Interval]:
    """Means over clips of rows of `measured`, with intervals from a bootstrap over clips."""
    errors = [float(row["squared error"].mean()) for row in rows]
    found = {
        "psnr": _psnr(interval(errors)),
        "mean psnr of clips": interval(float(decibels(x)) for x in errors),
    }
    for name in ("ssim", "lpips"):
        if name in rows[0]:
            found[name] = interval(float(row[name].mean()) for row in rows)
    return found


def above(rows: Sequence[Mapping[str, Float[np.ndarray, " f"]]], floors: Sequence) -> Interval:
    """Decibels of all clips together by which rows of `measured` are better than others of them."""
    errors = ([float(row["squared error"].mean()) for row in each] for each in (rows, floors))
    return of_means(lambda own, other: decibels(own) - decibels(other), *errors)


def plots(of: Mapping[str, Sequence[Mapping[str, Float[np.ndarray, " f"]]]]) -> list[Plot]:
    """Each measure by the place of a frame in its clip, a line for each of `of`."""
    rows = next(iter(of.values()))
    drawn = []
    for measure in rows[0]:
        lines = {}
        for name, held in of.items():
            places = np.stack([row[measure] for row in held]).T
            line = [interval(place) for place in places]
            if measure == "squared error":
                # An exact frame has no decibels.
                line = [_psnr(x) if x.mean else Interval(np.nan, np.nan, np.nan, 0) for x in line]
            lines[name] = line
        shown = "psnr" if measure == "squared error" else measure
        drawn.append(
            Plot(
                name=f"{shown}_by_place",
                title=f"{shown} by the place of a frame in its clip",
                x_label="frame",
                y_label="dB" if shown == "psnr" else shown,
                x=list(range(len(rows[0][measure]))),
                lines=lines,
            )
        )
    return drawn


def _psnr(error: Interval) -> Interval:
    """Of an interval of mean squared errors; the order turns round."""
    mean, low, high = (float(decibels(x)) for x in (error.mean, error.high, error.low))
    return Interval(mean, low, high, error.count)
