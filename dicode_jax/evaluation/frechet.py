"""The Fréchet distance between two sets of features, as FID and FVD report it.

Heusel et al., arXiv 1706.08500; Unterthiner et al., arXiv 1812.01717. The features come from the
caller: no network is part of this package.
"""

import numpy as np

from dicode_jax.errors import UserError
from dicode_jax.typing import Float, typechecked


@typechecked
def frechet_distance(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "m d"]) -> float:
    """Squared distance between Gaussians that are fitted to two sets, in float64.

    The trace of the root of both covariances' product comes from the eigenvalues of a symmetric
    matrix, which holds for singular covariances too (fewer samples than features).

    Raises:
      UserError: A set has fewer than two samples.
    """
    if min(len(first), len(second)) < 2:
        raise UserError(
            f"a covariance needs two samples at least, got {len(first)} and {len(second)}"
        )
    first, second = first.astype(np.float64), second.astype(np.float64)
    a, b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (first, second))
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
    apart = first.mean(axis=0) - second.mean(axis=0)
    return float(apart @ apart + np.trace(a) + np.trace(b) - 2 * cross)
