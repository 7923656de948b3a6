"""The distance of Gaussians in closed form."""

import numpy as np
import pytest

from dicode_jax.errors import UserError
from dicode_jax.evaluation.frechet import frechet_distance


def with_moments(mean, root, count=40, seed=0):
    """Samples whose mean and covariance are exactly `mean` and `root root^T`."""
    x = np.random.default_rng(seed).normal(size=(count, len(mean)))
    x -= x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False)).T)
    return white @ np.asarray(root).T + mean


def test_commuting_covariances_have_a_closed_form():
    first = with_moments([1.0, 0.0, 2.0], np.diag([1.0, 2.0, 3.0]))
    second = with_moments([0.0, 0.0, 0.0], np.diag([2.0, 2.0, 0.5]), seed=1)
    np.testing.assert_allclose(frechet_distance(first, second), 5 + 1 + 0 + 2.5**2, rtol=1e-9)


def test_it_is_symmetric_and_zero_for_the_same_set_also_where_samples_are_few():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(5, 9)), rng.normal(size=(6, 9))
    there, back = frechet_distance(first, second), frechet_distance(second, first)
    np.testing.assert_allclose(there, back, rtol=1e-6)
    np.testing.assert_allclose(frechet_distance(first, first), 0, atol=1e-6)


def test_one_sample_is_refused():
    with pytest.raises(UserError, match="two samples at least, got 1 and 4"):
        frechet_distance(np.zeros((1, 3)), np.zeros((4, 3)))
