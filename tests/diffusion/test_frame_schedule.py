"""Every frame takes all its steps, in order, while the network sees it."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dicode_jax.diffusion.frame_schedule import frame_schedule
from dicode_jax.errors import UserError


@pytest.mark.parametrize(("lag", "calls"), [(0, 50), (5, 125), (10, 200), (25, 425), (50, 800)])
def test_sixteen_frames_take_the_calls_of_the_paper(lag, calls):
    assert len(frame_schedule(16, 50, lag, window=16).moves) == calls


@hypothesis.given(
    frames=st.integers(1, 40),
    steps=st.integers(1, 12),
    lag=st.integers(0, 12),
    window=st.integers(1, 8),
    given=st.integers(0, 39),
)
@hypothesis.settings(max_examples=200)
def test_a_schedule_that_passes_moves_every_frame_through_all_steps(
    frames, steps, lag, window, given
):
    lag, given = min(lag, steps), min(given, frames - 1)
    made = frame_schedule(frames, steps, lag, window=window, num_given=given)
    rows, size = len(made.moves), min(window, frames)
    assert rows == steps + (frames - given - 1) * lag
    np.testing.assert_array_equal(made.moves.sum(axis=0), [0] * given + [steps] * (frames - given))
    assert np.isin(np.diff(made.steps, axis=0), (0, 1)).all()
    assert (made.steps[-1] == steps).all()
    assert made.moves[0, given]  # what follows the given frames starts at once
    assert (np.diff(made.steps[:, given:], axis=1) <= 0).all()  # never ahead of the frame before
    assert ((made.starts >= 0) & (made.starts <= frames - size)).all()
    assert np.isin(np.diff(made.starts), (0, 1)).all()
    parts = list(made.parts())
    assert parts[0][0] == 0
    assert [start for start, _ in parts[1:]] + [rows] == [stop for _, stop in parts]
    assert max(stop - start for start, stop in parts) <= (lag or steps)
    if frames - given <= size or size * lag >= steps:
        made.check()
        assert all(made.starts[stop - 1] - made.starts[start] <= 1 for start, stop in parts)
        ends = [stop for _, stop in parts]
        assert {int(np.argmax(made.steps[:, f] == steps)) for f in range(given, frames)} <= {*ends}
    else:
        with pytest.raises(UserError, match="must reach"):
            made.check()


def test_a_lag_too_small_for_the_window_is_named_with_the_least():
    with pytest.raises(UserError, match=r"16 \* lag must reach the 50 steps, so lag 4 at least"):
        frame_schedule(20, 50, 2, window=16).check()
    frame_schedule(128, 50, 4, window=16).check()


@pytest.mark.parametrize("lag", [-1, 6])
def test_a_lag_beyond_the_steps_is_refused(lag):
    with pytest.raises(UserError, match="0 to the 5 steps"):
        frame_schedule(4, 5, lag, window=4)


def test_nothing_left_to_generate_is_refused():
    with pytest.raises(UserError, match="4 frames are given"):
        frame_schedule(4, 5, 1, window=4, num_given=4)
