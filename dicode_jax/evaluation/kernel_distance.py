"""The kernel distance between two sets of features: unbiased, so that small sets can be compared.

Bińkowski et al., arXiv 1801.01401 (KID); on features of videos it is called KVD.
"""

import numpy as np

from dicode_jax.errors import UserError
from dicode_jax.typing import Float, typechecked


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

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    xx, yy = kernel(x, x), kernel(y, y)
    same = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(same - 2 * kernel(x, y).mean())
