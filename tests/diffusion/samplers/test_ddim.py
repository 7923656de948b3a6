"""DDIM: closed forms, every number of steps, randomness, levels per frame, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.diffusion import parameterization as P
from dicode_jax.diffusion.samplers.base import sample
from dicode_jax.diffusion.samplers.ddim import DDIM
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.diffusion.time_grid import ddim_time_grid

V = NoiseSchedule(zero_terminal_snr=True, parameterization="v")
X = jax.random.normal(jax.random.key(0), (3, 2, 4, 5, 6))
KEYS = jax.random.split(jax.random.key(1), 3)


def oracle(schedule, x0):
    """A network that knows the clean sample."""

    def denoise(x, t, _):
        signal = schedule.gather("sqrt_alphas_cumprod", t, x.ndim)
        spread = schedule.gather("sqrt_one_minus_alphas_cumprod", t, x.ndim)
        eps = (x - signal * x0) / spread
        return P.training_target(schedule, jnp.broadcast_to(x0, x.shape), eps, t)

    return denoise


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize("spacing", ["uniform", "quad"])
def test_with_a_perfect_network_eta_0_keeps_the_noise_it_started_from(parameterization, spacing):
    schedule = NoiseSchedule(parameterization=parameterization)
    grid = ddim_time_grid(spacing, 6)
    x0 = 0.3 * jnp.ones_like(X)
    signal, spread = (
        schedule.table(f"sqrt_{name}_cumprod") for name in ("alphas", "one_minus_alphas")
    )
    start = signal[grid[0]] * x0 + spread[grid[0]] * X
    got, steps = sample(
        oracle(schedule, x0), DDIM(schedule=schedule, eta=0.0), start, grid, return_trajectory=True
    )
    # The last step goes to timestep 0, whose noise is still there.
    np.testing.assert_allclose(got, signal[0] * x0 + spread[0] * X, atol=1e-5)
    np.testing.assert_allclose(steps.x0, jnp.broadcast_to(x0, steps.x0.shape), atol=1e-5)


def test_a_grid_that_ends_at_minus_one_ends_at_the_clean_sample():
    grid = np.array([999, 500, 20, -1])
    got, _ = sample(oracle(V, jnp.float32(0.7)), DDIM(schedule=V, eta=0.0), X, grid)
    np.testing.assert_allclose(got, 0.7, atol=1e-5)


def test_eta_1_has_the_variance_of_the_true_posterior():
    schedule = NoiseSchedule()
    tables = DDIM(schedule=schedule, eta=1.0).tables(np.array([700, 699]))
    np.testing.assert_allclose(
        tables.sigmas[0] ** 2, schedule.table("posterior_variance")[700], rtol=5e-6
    )
    assert DDIM(schedule=schedule, eta=0.5).tables(np.array([700, 699])).sigmas[0] == (
        0.5 * tables.sigmas[0]
    )


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_coefficients_are_finite_for_every_number_of_steps(eta):
    sampler = DDIM(schedule=V, eta=eta)
    for num_steps in range(2, 201):
        for spacing in ("uniform_trailing", "uniform", "quad"):
            for values in sampler.coefficients(ddim_time_grid(spacing, num_steps))[1]:
                assert np.isfinite(values).all(), (spacing, num_steps)


@pytest.mark.parametrize("num_steps", [7, 11, 25, 61])
def test_trailing_grids_with_eta_1_give_numbers(num_steps):
    grid = ddim_time_grid("uniform_trailing", num_steps)
    got, _ = sample(lambda x, t, _: 0.1 * x, DDIM(schedule=V), X, grid, keys=KEYS)
    assert np.isfinite(got).all()


def test_eta_0_needs_no_randomness_and_repeats():
    grid = ddim_time_grid("uniform", 4)
    run = lambda: sample(lambda x, t, _: jnp.sin(x), DDIM(schedule=V, eta=0.0), X, grid)  # noqa: E731
    np.testing.assert_array_equal(run()[0], run()[0])
    assert run()[1] is None  # states of the steps are kept where they are asked for


def test_a_sample_does_not_depend_on_the_batch_it_is_in():
    grid = ddim_time_grid("uniform", 4)
    denoise = lambda x, t, _: 0.3 * x  # noqa: E731
    scaled = lambda x, keys: sample(denoise, DDIM(schedule=V), x, grid, keys=keys)[0]  # noqa: E731
    np.testing.assert_allclose(scaled(X, KEYS)[1:2], scaled(X[1:2], KEYS[1:2]), atol=1e-6)
    assert np.abs(scaled(X[:1], KEYS[:1]) - scaled(X[:1], KEYS[1:2])).max() > 0.1


def test_given_noise_is_used_step_by_step_and_the_loops_agree():
    grid = ddim_time_grid("uniform", 3)
    noise = jax.random.normal(jax.random.key(4), (3, *X.shape))
    options = {"noise": noise, "return_trajectory": True}
    denoise = lambda x, t, _: jnp.tanh(x)  # noqa: E731
    got, steps = sample(denoise, DDIM(schedule=V), X, grid, **options)
    again, loop = sample(denoise, DDIM(schedule=V), X, grid, use_scan=False, **options)
    np.testing.assert_allclose(got, again, atol=1e-6)
    np.testing.assert_allclose(steps.x0, loop.x0, atol=1e-6)
    assert steps.x.shape == noise.shape
    other = noise.at[2].add(1.0)  # noise enters at the last step too
    moved, _ = sample(denoise, DDIM(schedule=V), X, grid, noise=other)
    sigma = DDIM(schedule=V).coefficients(grid)[1].noise[2]
    np.testing.assert_allclose(moved - got, np.full(X.shape, sigma), atol=1e-5)


def test_a_grid_per_frame_moves_each_frame_by_its_own_steps():
    first, second = np.array([900, 300, 0]), np.array([500, 500, 20])
    grid = np.stack([first, second], axis=1)
    sampler = DDIM(schedule=V, eta=0.0)
    denoise = lambda x, t, _: jnp.cos(x)  # noqa: E731
    whole, _ = sample(denoise, sampler, X, grid)
    for frame, own in enumerate((first, second)):
        alone, _ = sample(denoise, sampler, X[:, frame], own)
        np.testing.assert_allclose(whole[:, frame], alone, atol=1e-6)


def test_dynamic_rescale_multiplies_the_estimate_by_the_ratio_of_factors():
    schedule = NoiseSchedule(parameterization="v", base_scale=0.5, turning_step=400)
    grid = np.array([800, 200, 0])
    ratio = DDIM(schedule=schedule).coefficients(grid)[1].x0_scale
    scales = schedule.scale_array
    np.testing.assert_allclose(ratio, [scales[200] / scales[800], 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([1000, 0], "0..999"),
        ([-1, -1], "0..999"),
        ([10, 20], "ascend"),
    ],
)
def test_impossible_grids_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        DDIM(schedule=V).tables(np.array(grid))


def test_noise_prediction_at_zero_snr_is_refused():
    schedule = NoiseSchedule(zero_terminal_snr=True, parameterization="eps")
    with pytest.raises(ValueError, match=r"t = 999.*v-prediction"):
        DDIM(schedule=schedule).coefficients(ddim_time_grid("uniform_trailing", 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "keys"),
        ({"keys": KEYS[:2]}, "one key per sample"),
        ({"noise": jnp.zeros((2, *X.shape))}, "noise must have shape"),
    ],
)
def test_missing_or_misshapen_randomness_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(lambda x, t, _: x, DDIM(schedule=V), X, ddim_time_grid("uniform", 3), **options)


def test_eta_and_table_type_are_checked():
    with pytest.raises(ValueError, match="eta"):
        DDIM(schedule=V, eta=1.5)
    with pytest.raises(ValueError, match="bfloat16"):
        DDIM(schedule=V, table_dtype="bfloat16")
