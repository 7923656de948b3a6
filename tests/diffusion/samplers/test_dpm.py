"""DPM-Solver++(2M): exact solutions on Gaussian data, its order, DDIM, zero SNR, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.diffusion.parameterization import training_target
from dicode_jax.diffusion.samplers.base import sample
from dicode_jax.diffusion.samplers.ddim import DDIM
from dicode_jax.diffusion.samplers.dpm import DPMSolver
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.diffusion.time_grid import ddim_time_grid

MEAN, SPREAD = 0.7, 0.4  # of the data, normal in every coordinate
V = NoiseSchedule(zero_terminal_snr=True, parameterization="v")
X = jax.random.normal(jax.random.key(0), (3, 2, 4, 5, 6))
KEYS = jax.random.split(jax.random.key(1), 3)


def optimal(schedule):
    """The best network for the data: its clean estimate is the mean of the posterior."""

    def denoise(x, t, _):
        signal = schedule.gather("sqrt_alphas_cumprod", t, x.ndim)
        spread = schedule.gather("sqrt_one_minus_alphas_cumprod", t, x.ndim)
        gain = signal * SPREAD**2 / (signal**2 * SPREAD**2 + spread**2)
        x0 = MEAN + gain * (x - signal * MEAN)
        return training_target(schedule, x0, (x - signal * x0) / spread, t)

    return denoise


def marginal(schedule, t):
    """Mean and standard deviation of the noisy data at a timestep."""
    a = schedule.alphas_cumprod64[t]
    return np.sqrt(a) * MEAN, np.sqrt(a * SPREAD**2 + 1 - a)


def ode_solution(schedule, x, start, end):
    """Where the probability flow carries ``x``: it keeps the distance in standard deviations."""
    (mean, std), (new_mean, new_std) = marginal(schedule, start), marginal(schedule, end)
    return new_mean + new_std / std * (np.asarray(x, np.float64) - mean)


@pytest.mark.parametrize(
    ("parameterization", "zero_snr"),
    [("eps", False), ("x0", False), ("v", False), ("x0", True), ("v", True)],
)
def test_halving_the_steps_quarters_the_error_where_ddim_halves_it(parameterization, zero_snr):
    schedule = NoiseSchedule(parameterization=parameterization, zero_terminal_snr=zero_snr)
    start, end = (999, 119) if zero_snr else (920, 120)

    def orders(sampler):
        errors = []
        for num_steps in (10, 20, 40):
            grid = np.linspace(start, end, num_steps + 1).astype(int)
            got, _ = sample(optimal(schedule), sampler, X, grid)
            errors.append(np.abs(got - ode_solution(schedule, X, start, end)).max())
        return errors[-1], np.log2(np.divide(errors[:-1], errors[1:]))

    error, order = orders(DPMSolver(schedule=schedule))
    np.testing.assert_allclose(order, 2.0, atol=0.3)  # of few steps, where the next term shows
    coarse_error, coarse_order = orders(DDIM(schedule=schedule, eta=0.0))
    np.testing.assert_allclose(coarse_order, 1.0, atol=0.2)
    assert error < coarse_error / 5


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_sde_gives_the_mean_and_variance_of_the_data(eta):
    num_samples, grid = 40_000, np.linspace(999, 119, 45).astype(int)
    keys = jax.random.split(jax.random.key(2), 4)
    x = jax.random.normal(jax.random.key(3), (4, num_samples // 4))
    got, _ = sample(optimal(V), DPMSolver(schedule=V, eta=eta), x, grid, keys=keys)
    mean, std = marginal(V, 119)
    # Four standard errors of each; the bias of 44 steps lies below one.
    np.testing.assert_allclose(got.mean(), mean, atol=4 * std / num_samples**0.5)
    np.testing.assert_allclose(got.var() / std**2, 1.0, atol=4 * (2 / num_samples) ** 0.5)
    assert np.abs(np.corrcoef(got.ravel(), x.ravel())[0, 1]) < 0.1  # the start is forgotten


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_first_step_is_that_of_ddim(parameterization, eta):
    """With eta 0 also under the dynamic rescale and from zero SNR.

    There DDIM of eta 1 keeps 2e-4 of the noise, which rounding leaves it.
    """
    zero_snr = parameterization != "eps" and eta == 0
    schedule = NoiseSchedule(
        parameterization=parameterization,
        zero_terminal_snr=zero_snr,
        base_scale=None if eta else 0.7,  # which the noise of DDIM takes no account of
    )
    denoise = lambda x, t, _: jnp.sin(x)  # noqa: E731
    for grid in ([999 if zero_snr else 900, 300, 0], [300, 100, 0]):
        noise = jax.random.normal(jax.random.key(4), (2, *X.shape))
        dpm, ddim = (
            sample(
                denoise,
                kind(schedule=schedule, eta=eta),
                X,
                np.array(grid),
                noise=noise,
                return_trajectory=True,
            )[1]
            for kind in (DPMSolver, DDIM)
        )
        largest = np.abs(ddim.x[0]).max()  # eps at 900 is divided by a signal of 0.1
        np.testing.assert_allclose(dpm.x[0], ddim.x[0], atol=1e-5 * largest)
    assert np.abs(dpm.x[1] - ddim.x[1]).max() > 1e-3


def test_from_zero_snr_two_steps_are_of_order_1_and_all_numbers_are_finite():
    for eta in (0.0, 0.5, 1.0):
        times, c = DPMSolver(schedule=V, eta=eta).coefficients(np.array([999, 700, 300, 0]))
        np.testing.assert_array_equal(times, [999, 700, 300])
        assert (c.history > 0).tolist() == [False, False, True]
        assert all(np.isfinite(values).all() for values in c)
        assert c.x[0] == (np.sqrt(1 - V.alphas_cumprod64[700]) if eta == 0 else 0.0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_coefficients_are_finite_for_every_number_of_steps(eta):
    sampler = DPMSolver(schedule=V, eta=eta)
    for num_steps in range(2, 201):
        for spacing in ("uniform_trailing", "uniform", "quad"):
            for values in sampler.coefficients(ddim_time_grid(spacing, num_steps))[1]:
                assert np.isfinite(values).all(), (spacing, num_steps)


def test_the_last_step_is_of_order_1_by_choice_and_gives_the_estimate_where_it_ends_clean():
    denoise = lambda x, t, _: jnp.sin(x)  # noqa: E731
    whole, lower = (
        DPMSolver(schedule=V, lower_order_final=lower).coefficients(np.array([800, 600, 300, 0]))[1]
        for lower in (False, True)
    )
    np.testing.assert_array_equal(lower.history, [*whole.history[:2], 0.0])
    assert whole.history[2] > 0.1
    got, steps = sample(
        denoise,
        DPMSolver(schedule=V, eta=1.0),
        X,
        np.array([800, 600, 300, -1]),
        keys=KEYS,
        return_trajectory=True,
    )
    np.testing.assert_allclose(got, steps.x0[-1], rtol=1e-6, atol=1e-7)  # a few last bits


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_a_traced_eta_gives_what_a_number_gives(eta):
    grid = ddim_time_grid("uniform_trailing", 5)
    run = lambda eta: sample(  # noqa: E731
        lambda x, t, _: jnp.sin(x), DPMSolver(schedule=V, eta=eta), X, grid, keys=KEYS
    )[0]
    np.testing.assert_allclose(jax.jit(run)(eta), run(eta), atol=1e-5)


def test_a_sample_does_not_depend_on_the_batch_it_is_in():
    grid = ddim_time_grid("uniform", 4)
    run = lambda x, keys: sample(  # noqa: E731
        lambda x, t, _: 0.3 * x, DPMSolver(schedule=V, eta=1.0), x, grid, keys=keys
    )[0]
    np.testing.assert_allclose(run(X, KEYS)[1:2], run(X[1:2], KEYS[1:2]), atol=1e-6)
    assert np.abs(run(X[:1], KEYS[:1]) - run(X[:1], KEYS[1:2])).max() > 0.1


def test_a_grid_per_frame_moves_each_frame_by_its_own_steps():
    first, second = np.array([999, 600, 300, 0]), np.array([500, 500, 200, 20])
    sampler = DPMSolver(schedule=V)
    denoise = lambda x, t, _: jnp.cos(x)  # noqa: E731
    whole, _ = sample(denoise, sampler, X, np.stack([first, second], axis=1))
    for frame, own in enumerate((first, second)):
        alone, _ = sample(denoise, sampler, X[:, frame], own)
        np.testing.assert_allclose(whole[:, frame], alone, atol=1e-6)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="eta"):
        DPMSolver(schedule=V, eta=1.5)
    with pytest.raises(ValueError, match="ascend"):
        DPMSolver(schedule=V).coefficients(np.array([10, 20]))
    schedule = NoiseSchedule(zero_terminal_snr=True, parameterization="eps")
    with pytest.raises(ValueError, match=r"t = 999.*v-prediction"):
        DPMSolver(schedule=schedule).coefficients(ddim_time_grid("uniform_trailing", 5))
    with pytest.raises(ValueError, match="keys"):
        sample(lambda x, t, _: x, DPMSolver(schedule=V, eta=1.0), X, np.array([9, 0]))
