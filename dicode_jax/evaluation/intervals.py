"""Means with confidence intervals from a bootstrap (Efron, 1979)."""

import dataclasses
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % interval; NaN where there was nothing to average.

    Attributes:
      mean: Of all values.
      low, high: Between them lie 95 % of the means of samples drawn with replacement.
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


def interval(values: Iterable[float], *, draws: int = 2000) -> Interval:
    """Mean and 95 % interval of one number for each clip or video; NaN are left out.

    Always the same draws, so that the same values give the same interval.
    """
    found = np.asarray(list(values), np.float64)
    found = found[np.isfinite(found)]
    if not len(found):
        return Interval(np.nan, np.nan, np.nan, 0)
    rng = np.random.default_rng(0)
    means = found[rng.integers(0, len(found), (draws, len(found)))].mean(axis=1)
    low, high = map(float, np.percentile(means, (2.5, 97.5)))
    return Interval(float(found.mean()), low, high, len(found))
