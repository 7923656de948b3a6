"""The bootstrap's intervals against closed forms and SciPy-free properties."""

import numpy as np
import pytest

from dicode_jax.evaluation.intervals import interval, of_means


def test_an_interval_holds_the_mean_and_shrinks_with_the_root_of_the_count():
    found = interval(np.tile([0.0, 1.0], 200))
    assert (found.mean, found.count) == (0.5, 400)
    np.testing.assert_allclose(
        [found.low, found.high], [0.451, 0.549], atol=0.004
    )  # 1.96 * 0.5 / 20


def test_a_share_of_all_or_nothing_is_not_known_to_the_last_digit():
    found = interval([True] * 32)
    assert (found.mean, found.high) == (1, 1)
    assert found.low == pytest.approx(0.8928, abs=1e-4)  # Wilson's, as statsmodels gives it
    assert interval([False] * 32).high == pytest.approx(1 - found.low)
    assert interval([1.0] * 32).low == 1  # numbers are not shares
    assert interval([True, False]).low == 0


def test_what_is_made_of_means_is_drawn_for_all_of_them_together():
    one, other = np.random.default_rng(0).normal(size=(2, 300)) + np.array([[5.0], [3.0]])
    apart = lambda a, b: a - b  # noqa: E731
    found = of_means(apart, one, one - 2)
    assert [found.mean, found.low, found.high] == pytest.approx([2, 2, 2])
    free = of_means(apart, one, other)
    assert free.mean == pytest.approx(one.mean() - other.mean())
    assert free.high - free.low == pytest.approx(2 * 1.96 * np.sqrt(2 / 300), rel=0.15)


def test_what_is_no_number_is_left_out_and_nothing_has_no_mean():
    found = interval([1.0, np.nan, 3.0])
    assert (found.mean, found.count) == (2.0, 2)
    assert found.text(1) == "2.0 (1.0 to 3.0)"
    assert interval([np.nan]).count == 0
    assert interval([]).text() == "-"
