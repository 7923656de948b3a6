"""UniPC-2: a loop of the paper's own form, exact solutions on Gaussian data, order, zero SNR."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.diffusion.parameterization import training_target
from dicode_jax.diffusion.samplers.base import sample
from dicode_jax.diffusion.samplers.ddim import DDIM
from dicode_jax.diffusion.samplers.dpm import DPMSolver
from dicode_jax.diffusion.samplers.unipc import UniPC
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.diffusion.time_grid import ddim_time_grid

MEAN, SPREAD = 0.7, 0.4  # of the data, normal in every coordinate
V = NoiseSchedule(zero_terminal_snr=True, parameterization="v")
X = jax.random.normal(jax.random.key(0), (3, 2, 4, 5, 6))


def estimate(x, alpha, sigma):
    """The best clean estimate for the data: the mean of the posterior."""
    gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    return MEAN + gain * (x - alpha * MEAN)


def network(schedule, f=estimate):
    """What predicts the estimate ``f``, in the schedule's parameterization."""

    def denoise(x, t, _):
        signal = schedule.gather("sqrt_alphas_cumprod", t, x.ndim)
        spread = schedule.gather("sqrt_one_minus_alphas_cumprod", t, x.ndim)
        x0 = f(x, signal, spread)
        return training_target(schedule, x0, (x - signal * x0) / spread, t)

    return denoise


def exact(x, start, end):
    """Where the probability flow carries ``x``: it keeps the distance in standard deviations.

    Args:
        start, end: (alpha, sigma).
    """
    std, new_std = (np.sqrt(a**2 * SPREAD**2 + s**2) for a, s in (start, end))
    return end[0] * MEAN + new_std / std * (np.asarray(x, np.float64) - start[0] * MEAN)


def levels(schedule, grid):
    a = schedule.alphas_cumprod64[grid]
    return np.sqrt(a), np.sqrt(1 - a)


def paper(x, alpha, sigma, log_snr, f=estimate):
    """UniPC-2 with B2 in the paper's own form: rows of R rho = b, solved at each step, float64."""
    x, past = np.asarray(x, np.float64), []
    corrected = x
    for i in range(len(alpha)):
        new = f(x, alpha[i], sigma[i])
        if i:  # algorithm 5, UniC
            corrected = corrected_by(past, new, corrected, alpha, sigma, log_snr, i)
        past.append(new)
        if i + 1 < len(alpha):  # algorithm 7, UniP
            x = base_of(past[-1], corrected, alpha, sigma, log_snr, i + 1)
            if i:
                h, ratio = spans(log_snr, i + 1)
                x = x - alpha[i + 1] * np.expm1(-h) * 0.5 * (past[-2] - past[-1]) / ratio
    return x


def spans(log_snr, i):
    """h of the step that ends at i, and r_1, the step before in units of it (negative)."""
    h = log_snr[i] - log_snr[i - 1]
    return h, (log_snr[i - 2] - log_snr[i - 1]) / h


def base_of(last, x, alpha, sigma, log_snr, i):
    h = log_snr[i] - log_snr[i - 1]
    return sigma[i] / sigma[i - 1] * x - alpha[i] * np.expm1(-h) * last


def corrected_by(past, new, x, alpha, sigma, log_snr, i):
    h = log_snr[i] - log_snr[i - 1]
    bh = np.expm1(-h)
    differences, ratios = [new - past[-1]], [1.0]
    if i == 1 or spans(log_snr, i)[1] < -1e6:  # of order 1
        rho = [0.5]
    else:
        ratios.insert(0, spans(log_snr, i)[1])
        differences.insert(0, (past[-2] - past[-1]) / ratios[0])
        phi2 = np.expm1(-h) / -h - 1
        phi3 = phi2 / -h - 0.5
        rho = np.linalg.solve(np.vander(ratios, increasing=True).T, [phi2 / bh, 2 * phi3 / bh])
    total = sum(r * d for r, d in zip(rho, differences, strict=True))
    return base_of(past[-1], x, alpha, sigma, log_snr, i) - alpha[i] * bh * total


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize("num_steps", [1, 3, 9])
def test_steps_are_those_of_the_paper(parameterization, num_steps):
    """Of a network that is not linear."""
    schedule = NoiseSchedule(parameterization=parameterization)
    grid = np.linspace(900, 20, num_steps + 1).astype(int)
    alpha, sigma = levels(schedule, grid)
    wave = lambda x, alpha, sigma: np.cos(3 * x) + alpha - sigma  # noqa: E731
    wave_jax = lambda x, alpha, sigma: jnp.cos(3 * x) + alpha - sigma  # noqa: E731
    got, _ = sample(network(schedule, wave_jax), UniPC(schedule=schedule), X, grid)
    wanted = paper(X, alpha, sigma, np.log(alpha / sigma), wave)
    np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_from_zero_snr_they_are_the_limit_of_the_papers():
    grid = np.array([999, 800, 500, 150, 0])
    alpha, sigma = levels(V, grid)
    log_snr = np.append(-1e8, np.log(alpha[1:] / sigma[1:]))
    got, _ = sample(network(V), UniPC(schedule=V), X, grid)
    np.testing.assert_allclose(got, paper(X, alpha, sigma, log_snr), atol=1e-5)


def test_the_papers_form_is_of_order_3_on_gaussian_data():
    """Float64 and any time: the steps of a schedule are too few to see it."""
    errors = []
    for num_steps in (32, 64, 128):
        log_snr = np.linspace(-2.0, 2.0, num_steps + 1)
        alpha, sigma = (
            np.sqrt(1 / (1 + np.exp(-2 * log_snr))),
            np.sqrt(1 / (1 + np.exp(2 * log_snr))),
        )
        ends = [(alpha[i], sigma[i]) for i in (0, -1)]
        errors.append(np.abs(paper(X, alpha, sigma, log_snr) - exact(X, *ends)).max())
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 3.0, atol=0.3)


@pytest.mark.parametrize(
    ("parameterization", "zero_snr"), [("eps", False), ("x0", True), ("v", False), ("v", True)]
)
def test_ten_steps_err_a_third_as_much_as_dpm_and_a_tenth_as_ddim(parameterization, zero_snr):
    schedule = NoiseSchedule(parameterization=parameterization, zero_terminal_snr=zero_snr)
    start, end = (999, 119) if zero_snr else (920, 120)
    ends = [levels(schedule, t) for t in (start, end)]

    def error(sampler, num_steps):
        grid = np.linspace(start, end, num_steps + 1).astype(int)
        got, _ = sample(network(schedule), sampler, X, grid)
        return np.abs(got - exact(X, *ends)).max()

    ours, dpm, ddim = (
        UniPC(schedule=schedule),
        DPMSolver(schedule=schedule),
        DDIM(schedule=schedule, eta=0.0),
    )
    assert error(ours, 10) < error(dpm, 10) / 3
    assert error(ours, 10) < error(ddim, 10) / 10
    assert error(ours, 20) < error(ours, 10) / 8


def test_all_deterministic_samplers_come_to_the_exact_sample_from_zero_snr():
    grid = np.arange(999, -1, -1)
    wanted = exact(X, *(levels(V, t) for t in (999, 0)))
    of_order_1 = DDIM(schedule=V, eta=0.0)
    for sampler, bound in (
        (of_order_1, 1e-2),
        (DPMSolver(schedule=V), 1e-3),
        (UniPC(schedule=V), 1e-3),
    ):
        got, _ = sample(network(V), sampler, X, grid)
        np.testing.assert_allclose(got, wanted, atol=bound)


def test_coefficients_are_finite_for_every_number_of_steps():
    for num_steps in range(1, 201):
        for spacing in ("uniform_trailing", "uniform", "quad"):
            if spacing == "uniform" and num_steps == 1:
                continue  # leaves the schedule
            for values in UniPC(schedule=V).coefficients(ddim_time_grid(spacing, num_steps))[1]:
                assert np.isfinite(values).all(), (spacing, num_steps)


def test_the_first_step_from_zero_snr_keeps_the_noise_and_adds_the_estimate():
    _, steps = sample(
        network(V), UniPC(schedule=V), X, np.array([999, 600, 0]), return_trajectory=True
    )
    alpha, sigma = levels(V, 600)
    np.testing.assert_allclose(steps.x[0], sigma * X + alpha * MEAN, atol=1e-5)


def test_a_step_to_the_clean_sample_gives_the_estimate():
    got, steps = sample(
        network(V), UniPC(schedule=V), X, np.array([800, 600, 300, -1]), return_trajectory=True
    )
    np.testing.assert_array_equal(got, steps.x0[-1])


def test_the_dynamic_rescale_is_part_of_alpha():
    """A network that finds the true sample, rescaled as training does, is led to it at once."""
    schedule = NoiseSchedule(zero_terminal_snr=True, parameterization="v", base_scale=0.7)
    scale = lambda t, ndim: schedule.gather("scale_array", t, ndim)  # noqa: E731

    def denoise(x, t, _):
        signal = schedule.gather("sqrt_alphas_cumprod", t, x.ndim)
        spread = schedule.gather("sqrt_one_minus_alphas_cumprod", t, x.ndim)
        x0 = scale(t, x.ndim) * jnp.cos(X)
        return training_target(schedule, x0, (x - signal * x0) / spread, t)

    got, _ = sample(denoise, UniPC(schedule=schedule), X, np.array([999, 700, 300, -1]))
    np.testing.assert_allclose(got, jnp.cos(X), atol=1e-5)


def test_a_grid_per_frame_moves_each_frame_by_its_own_steps():
    first, second = np.array([999, 600, 300, 0]), np.array([500, 500, 200, 20])
    sampler = UniPC(schedule=V)
    denoise = lambda x, t, _: jnp.cos(x)  # noqa: E731
    whole, _ = sample(denoise, sampler, X, np.stack([first, second], axis=1))
    for frame, own in enumerate((first, second)):
        alone, _ = sample(denoise, sampler, X[:, frame], own)
        np.testing.assert_allclose(whole[:, frame], alone, atol=1e-6)


def test_impossible_grids_are_refused():
    with pytest.raises(ValueError, match="ascend"):
        UniPC(schedule=V).coefficients(np.array([10, 20]))
    schedule = NoiseSchedule(zero_terminal_snr=True, parameterization="eps")
    with pytest.raises(ValueError, match=r"t = 999.*v-prediction"):
        UniPC(schedule=schedule).coefficients(ddim_time_grid("uniform_trailing", 5))
