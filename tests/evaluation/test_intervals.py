"""The bootstrap's intervals against closed forms and SciPy-free properties."""

import numpy as np

from dicode_jax.evaluation.intervals import interval


def test_an_interval_holds_the_mean_and_shrinks_with_the_root_of_the_count():
    found = interval(np.tile([0.0, 1.0], 200))
    assert (found.mean, found.count) == (0.5, 400)
    np.testing.assert_allclose(
        [found.low, found.high], [0.451, 0.549], atol=0.004
    )  # 1.96 * 0.5 / 20


def test_what_is_no_number_is_left_out_and_nothing_has_no_mean():
    found = interval([1.0, np.nan, 3.0])
    assert (found.mean, found.count) == (2.0, 2)
    assert found.text(1) == "2.0 (1.0 to 3.0)"
    assert interval([np.nan]).count == 0
    assert interval([]).text() == "-"
