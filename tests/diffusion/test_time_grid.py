"""Time grids: the published ones, every number of steps, refusals."""

import numpy as np
import pytest

from dicode_jax.diffusion.time_grid import SPACINGS, ddim_time_grid, ddim_timesteps


def test_released_grid_visits_981_down_to_1_and_ends_at_0():
    np.testing.assert_array_equal(ddim_time_grid("uniform", 50), [*range(981, 0, -20), 0])


@pytest.mark.parametrize("num_steps", [2, 7, 50])
def test_quadratic_grid_grows_with_the_square_up_to_four_fifths(num_steps):
    fractions = np.arange(num_steps) / (num_steps - 1)
    steps = ddim_timesteps("quad", num_steps)
    np.testing.assert_allclose(steps - 1, 800 * fractions**2, atol=1)  # rounded down


@pytest.mark.parametrize("spacing", SPACINGS)
def test_tables_are_valid_for_every_number_of_steps(spacing):
    for num_steps in range(1, 501):
        if spacing == "uniform_upstream" and 999 % (1000 // num_steps) == 0 and num_steps > 1:
            continue  # the integer stride leaves the schedule: refused, see below
        steps = ddim_timesteps(spacing, num_steps)
        assert set(steps) <= set(range(1000)), num_steps
        assert (np.diff(steps) >= (0 if spacing == "quad" else 1)).all(), num_steps
        if spacing != "uniform_upstream":
            assert len(steps) == num_steps


@pytest.mark.parametrize("num_steps", [61, 103, 121, 122, 201, 333, 999, 1000])
def test_trailing_ends_at_999_and_never_holds_minus_one(num_steps):
    steps = ddim_timesteps("uniform_trailing", num_steps)
    assert steps[-1] == 999
    assert steps[0] >= 0
    assert len(steps) == num_steps


def test_integer_stride_gives_more_steps_than_asked_for():
    assert len(ddim_timesteps("uniform_upstream", 30)) == 31
    assert len(ddim_timesteps("uniform", 30)) == 30


@pytest.mark.parametrize(("spacing", "num_steps"), [("uniform", 501), ("uniform_upstream", 3)])
def test_a_grid_outside_the_schedule_is_refused_with_a_way_out(spacing, num_steps):
    with pytest.raises(ValueError, match=r"would visit timestep 1000.*uniform_trailing"):
        ddim_timesteps(spacing, num_steps)


@pytest.mark.parametrize("num_steps", [0, -3, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match=str(num_steps)):
        ddim_timesteps("uniform_trailing", num_steps)


def test_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match="'linear'"):
        ddim_timesteps("linear", 10)
