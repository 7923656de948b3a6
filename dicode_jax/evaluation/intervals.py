"""Means with confidence intervals from a bootstrap (Efron, 1979).

Of shares that are all or nothing it would draw nothing else, and give no width to what a dozen
clips cannot know: these have Wilson's interval (1927).
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float

_Z = 1.959964  # standard deviations within which 95 % of a normal distribution lie


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % interval; NaN where there was nothing to average.

    Attributes:
      mean: Of all values.
      low, high: Between them lie 95 % of the means of samples drawn with replacement; of shares
        that are all or nothing, Wilson's score interval.
      count: Values that it is of.
    """

    mean: float
    low: float
    high: float
    count: int

    def text(self, digits: int = 3) -> str:
        """`0.970 (0.940 to 0.990)`."""
        mean, low, high = (f"{x:.{digits}f}" for x in (self.mean, self.low, self.high))
        return f"{mean} ({low} to {high})" if self.count else "-"


def of_means(
    measure: Callable[..., Float[np.ndarray, " n"]], *values: Sequence[float], draws: int = 2000
) -> Interval:
    """What a function makes of means, with the interval that the same draws of all of them give.

    Args:
      measure: Means [n] of each of `values` -> numbers [n].
      values: Rows of equal length, place by place of one clip.
      draws: Samples of the bootstrap.
    """
    held = np.asarray(values, np.float64)
    count = held.shape[1]
    places = np.random.default_rng(0).integers(0, count, (draws, count))
    low, high = map(float, np.percentile(measure(*held[:, places].mean(axis=2)), (2.5, 97.5)))
    return Interval(float(measure(*held.mean(axis=1, keepdims=True))[0]), low, high, count)


def interval(values: Iterable[float], *, draws: int = 2000) -> Interval:
    """Mean and 95 % interval of one number for each clip or video; NaN are left out.

    Always the same draws, so that the same values give the same interval.

    Args:
      values: Numbers; or yes and no, of which the mean is a share.
      draws: Samples of the bootstrap.
    """
    said = list(values)
    found = np.asarray(said, np.float64)
    found = found[np.isfinite(found)]
    if not len(found):
        return Interval(np.nan, np.nan, np.nan, 0)
    if all(isinstance(x, bool | np.bool_) for x in said) and found[0] == found.mean():
        off = _Z**2 / (len(found) + _Z**2)
        low, high = (1 - off, 1.0) if found[0] else (0.0, off)
        return Interval(float(found[0]), low, high, len(found))
    rng = np.random.default_rng(0)
    means = found[rng.integers(0, len(found), (draws, len(found)))].mean(axis=1)
    low, high = map(float, np.percentile(means, (2.5, 97.5)))
    return Interval(float(found.mean()), low, high, len(found))
