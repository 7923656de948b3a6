"""The kernel distance against its definition, pair by pair, and its mean."""

import numpy as np
import pytest

from dicode_jax.errors import UserError
from dicode_jax.evaluation.kernel_distance import kernel_distance


def test_it_is_the_sum_over_pairs_without_those_of_one_sample_with_itself(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 3)), rng.normal(size=(5, 3)) + 1
    kernel = lambda a, b: (float(a @ b) / 3 + 1) ** 3  # noqa: E731
    mean = lambda pairs: np.mean([kernel(a, b) for a, b in pairs])  # noqa: E731
    apart = [[(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j] for a in (x, y)]
    wanted = mean(apart[0]) + mean(apart[1]) - 2 * mean([(a, b) for a in x for b in y])
    np.testing.assert_allclose(kernel_distance(x, y), wanted, rtol=1e-12)
    np.testing.assert_allclose(kernel_distance(y, x), wanted, rtol=1e-12)
    monkeypatch.setattr("dicode_jax.evaluation.kernel_distance.ROWS", 2)
    np.testing.assert_allclose(kernel_distance(y, x), wanted, rtol=1e-12)


def test_it_is_zero_on_the_mean_for_small_sets_of_one_distribution():
    rng = np.random.default_rng(1)
    found = [kernel_distance(*rng.normal(size=(2, 6, 4))) for _ in range(400)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20
    assert min(found) < 0 < max(found)


def test_one_sample_is_refused():
    with pytest.raises(UserError, match="two samples at least, got 1 and 4"):
        kernel_distance(np.zeros((1, 3)), np.zeros((4, 3)))
