"""The sampler of subsampled levels: where it begins and ends, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.diffusion.samplers.base import sample
from dicode_jax.diffusion.samplers.subsampled import SubsampledDPM, subsampled_time_grid
from dicode_jax.diffusion.schedules import NoiseSchedule

SCHEDULE = NoiseSchedule(zero_terminal_snr=True, parameterization="v", snr_shift=3.0)
SAMPLER = SubsampledDPM(schedule=SCHEDULE)


@pytest.mark.parametrize("num_steps", [2, 7, 50])
def test_a_network_that_knows_the_data_gets_it_back(num_steps):
    data = jax.random.normal(jax.random.key(0), (2, 3, 4))
    grid = subsampled_time_grid(num_steps)
    signals = jnp.sqrt(jnp.asarray(SCHEDULE.alphas_cumprod64, jnp.float32))
    levels = signals[SAMPLER.nearest(SAMPLER.signals(grid)[:-1])]

    def denoise(x, times, step):  # the velocity whose clean estimate is the data
        a = levels[step]
        return (a * x - data) / jnp.sqrt(1 - a**2)

    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(jax.random.key(2), data.shape)
    out, states = sample(denoise, SAMPLER, x, grid, keys=keys, return_trajectory=True)
    np.testing.assert_allclose(out, data, atol=1e-5)
    assert np.isfinite(states.x).all()
    # Noisy states have the noise of their level, and the level of training is near.
    _, c = SAMPLER.coefficients(grid)
    np.testing.assert_allclose(c.signal, SAMPLER.signals(grid)[:-1], atol=2e-3)


def test_the_last_level_and_the_number_of_steps():
    signals = SAMPLER.signals(subsampled_time_grid(50))
    assert (signals[0], signals[-1]) == (0.0, 1.0)
    assert (np.diff(signals) > 0).all()
    for count in (1, 1001):
        with pytest.raises(ValueError, match=f"2..1000, got {count}"):
            subsampled_time_grid(count)


@pytest.mark.parametrize("grid", [[999, -1], [999, 500, 0], [999, 999, -1], [[999], [5], [-1]]])
def test_grids_that_end_elsewhere_or_stand_still_are_refused(grid):
    with pytest.raises(ValueError, match="two or more descending timesteps"):
        SAMPLER.coefficients(np.array(grid))


def test_schedules_that_it_cannot_step_are_refused():
    noise = NoiseSchedule(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="noise prediction"):
        SubsampledDPM(schedule=noise).coefficients(subsampled_time_grid(5))
    with pytest.raises(ValueError, match="dynamic rescale"):
        SubsampledDPM(schedule=NoiseSchedule(base_scale=0.7))
