"""The kernel distance between two sets of features: unbiased, so that small sets can be compared.

Bińkowski et al., arXiv 1801.01401 (KID); on features of videos it is called KVD.
"""

import numpy as np

from dicode_jax.errors import UserError
from dicode_jax.typing import Float, typechecked

ROWS = 1024


@typechecked
def kernel_distance(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "m d"]) -> float:
    """Squared maximum mean discrepancy of the kernel (x y / d + 1)^3, in float64.

    Its mean over draws is that of infinitely many samples: 0 for two sets of one distribution, so
    that single values may be negative.

    Raises:
      UserError: A set has fewer than two samples.
    """
    n, m = len(first), len(second)
    if min(n, m) < 2:
        raise UserError(f"a kernel distance needs two samples at least, got {n} and {m}")
    x, y = first.astype(np.float64), second.astype(np.float64)

    def total(a: np.ndarray, b: np.ndarray) -> float:
        """The kernel's sum over all pairs, some rows at a time: of frames there are many."""
        parts = (a[i : i + ROWS] @ b.T / a.shape[1] + 1 for i in range(0, len(a), ROWS))
        return sum(float((part**3).sum()) for part in parts)

    def itself(a: np.ndarray) -> float:
        return float(((np.square(a).sum(axis=1) / a.shape[1] + 1) ** 3).sum())

    same = (total(x, x) - itself(x)) / (n * (n - 1)) + (total(y, y) - itself(y)) / (m * (m - 1))
    return float(same - 2 * total(x, y) / (n * m))
