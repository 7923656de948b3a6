"""What samplers refuse: grids that leave the schedule, noise that cannot be inverted, an eta."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.diffusion.samplers import checks
from dicode_jax.diffusion.schedules import NoiseSchedule

SCHEDULE = NoiseSchedule(num_timesteps=10)


@pytest.mark.parametrize("grid", [[9, 0, -1], [9, 9, 0], [0, -1], [[9, 5], [0, 5], [-1, 0]]])
def test_steps_start_inside_the_schedule_and_the_last_may_end_clean(grid):
    start, end = checks.split_grid(np.array(grid), SCHEDULE)
    np.testing.assert_array_equal(start, grid[:-1])
    np.testing.assert_array_equal(end, grid[1:])


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([10, 0], r"spans 0\.\.10, but steps must start in 0\.\.9"),
        ([9, -2], r"spans -2\.\.9"),
        ([9, -1, -1], r"spans -1\.\.9"),
        ([5, 6], "must not ascend"),
    ],
)
def test_other_grids_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        checks.split_grid(np.array(grid), SCHEDULE)


def test_noise_prediction_is_refused_where_nothing_of_the_sample_is_left():
    start, alphas = np.array([7, 8, 9]), np.array([0.1, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"\(t = 9\)"):
        checks.check_inversion(SCHEDULE, start, alphas)
    checks.check_inversion(SCHEDULE, start, alphas + 1e-9)
    for parameterization in ("v", "x0"):
        checks.check_inversion(NoiseSchedule(parameterization=parameterization), start, alphas)


def test_a_traced_eta_may_be_anything_and_a_number_lies_in_0_to_1():
    for eta in (0.0, 0.5, 1.0):
        checks.check_eta(eta)
        assert checks.is_nonzero(eta) == (eta > 0)
        assert checks.namespace(eta) is np
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"^eta must be in 0..1, got {eta}$"):
            checks.check_eta(eta)

    @jax.jit
    def traced(eta):
        checks.check_eta(eta)
        assert checks.is_nonzero(eta)
        assert checks.namespace(eta) is jnp
        return eta

    assert traced(2.0) == 2.0
