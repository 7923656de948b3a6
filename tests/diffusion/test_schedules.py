"""Noise schedules: closed forms, the zero-terminal-SNR rescale, errors."""

import numpy as np
import pytest

from dicode_jax.diffusion.schedules import (
    PERSISTENT_BUFFERS,
    NoiseSchedule,
    expand,
    make_betas,
    rescale_zero_terminal_snr,
)


def test_betas_are_linear_in_their_square_root():
    roots = np.sqrt(NoiseSchedule(num_timesteps=11).betas64)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-12)
    np.testing.assert_allclose(roots[[0, -1]] ** 2, [0.00085, 0.012], rtol=1e-12)


def test_zero_terminal_snr_ends_at_exactly_zero_and_keeps_the_first_value():
    plain = NoiseSchedule(num_timesteps=50)
    rescaled = NoiseSchedule(num_timesteps=50, zero_terminal_snr=True)
    assert rescaled.table("alphas_cumprod")[-1] == 0.0
    assert rescaled.betas64[-1] == 1.0
    np.testing.assert_allclose(rescaled.betas64[0], plain.betas64[0], rtol=1e-12)
    assert (rescaled.alphas_cumprod64[1:] < plain.alphas_cumprod64[1:]).all()


def test_the_defaults_are_those_of_the_original():
    assert NoiseSchedule() == NoiseSchedule(
        num_timesteps=1000,
        beta_schedule="linear",
        linear_start=0.00085,
        linear_end=0.012,
        zero_terminal_snr=False,
        parameterization="eps",
        base_scale=None,
        turning_step=400,
        v_posterior=0.0,
    )


@pytest.mark.parametrize(("name", "power"), [("linear", 0.5), ("sqrt_linear", 1.0), ("sqrt", 2.0)])
def test_a_power_of_the_betas_of_the_linear_families_rises_evenly(name, power):
    ends = {"linear_start": 0.01, "linear_end": 0.3}
    rising = make_betas(name, 9, **ends) ** power
    first, last = np.power(list(ends.values()), 0.5 if name == "linear" else 1.0)
    np.testing.assert_allclose(rising, first + (last - first) * np.arange(9) / 8, rtol=1e-12)


def test_cosine_betas_leave_a_squared_cosine_of_the_signal():
    betas = make_betas("cosine", 50, linear_start=0.0, linear_end=0.0)
    angle = lambda step: (step / 50 + 0.008) / 1.008 * np.pi / 2  # noqa: E731
    wanted = np.cos(angle(np.arange(1, 50))) ** 2 / np.cos(angle(0)) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], wanted, rtol=1e-9)
    assert betas[-1] == 0.999  # where nothing would be left


def test_rescale_is_affine_in_the_square_root_of_alphas_cumprod():
    betas = make_betas("linear", 9, linear_start=0.01, linear_end=0.3)
    before = np.sqrt(np.cumprod(1 - betas))
    after = np.sqrt(np.cumprod(1 - rescale_zero_terminal_snr(betas)))
    ratio = np.diff(after) / np.diff(before)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_posterior_tables_are_those_of_bayes_rule(parameterization):
    schedule = NoiseSchedule(num_timesteps=20, parameterization=parameterization)
    betas, acp = schedule.betas64[7], schedule.alphas_cumprod64
    # q(x_6 | x_7, x_0) is a product of two normals: precisions add.
    precision = (1 - betas) / betas + 1 / (1 - acp[6])
    tables = schedule.buffers
    np.testing.assert_allclose(tables["posterior_variance"][7], 1 / precision, rtol=1e-6)
    np.testing.assert_allclose(
        tables["posterior_mean_coef1"][7], np.sqrt(acp[6]) / (1 - acp[6]) / precision, rtol=1e-6
    )
    np.testing.assert_allclose(
        tables["posterior_mean_coef2"][7], np.sqrt(1 - betas) / betas / precision, rtol=1e-6
    )
    assert set(PERSISTENT_BUFFERS) < set(tables)
    assert all(table.dtype == np.float32 and table.shape == (20,) for table in tables.values())


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_tables_are_functions_of_the_betas(zero_terminal_snr):
    schedule = NoiseSchedule(num_timesteps=20, zero_terminal_snr=zero_terminal_snr)
    betas = schedule.betas64
    signal = np.cumprod(1 - betas)
    with np.errstate(divide="ignore"):
        wanted = {
            "betas": betas,
            "alphas_cumprod": signal,
            "alphas_cumprod_prev": np.append(1, signal[:-1]),
            "sqrt_alphas_cumprod": signal**0.5,
            "sqrt_one_minus_alphas_cumprod": (1 - signal) ** 0.5,
            "log_one_minus_alphas_cumprod": np.log(1 - signal),
            "sqrt_recip_alphas_cumprod": signal**-0.5,
            "sqrt_recipm1_alphas_cumprod": ((1 - signal) / signal) ** 0.5,
        }
    for name, table in wanted.items():
        np.testing.assert_allclose(schedule.table(name), table, rtol=1e-6, err_msg=name)
    got, variance = map(schedule.table, ("posterior_log_variance_clipped", "posterior_variance"))
    assert variance[0] == 0
    np.testing.assert_allclose(np.exp(got), np.append(1e-20, variance[1:]), rtol=1e-5)


def test_posterior_variance_goes_from_bayes_rule_to_beta():
    tables = {
        v: NoiseSchedule(num_timesteps=20, v_posterior=v).table("posterior_variance")
        for v in (0.0, 0.25, 1.0)
    }
    np.testing.assert_allclose(tables[1.0], NoiseSchedule(num_timesteps=20).betas64, rtol=1e-6)
    np.testing.assert_allclose(tables[0.25], 0.75 * tables[0.0] + 0.25 * tables[1.0], rtol=1e-6)


def test_bound_weights_are_what_the_posterior_makes_of_an_error():
    schedule = NoiseSchedule(num_timesteps=20)
    betas, signal = schedule.betas64[1:], schedule.alphas_cumprod64
    variance = betas * (1 - signal[:-1]) / (1 - signal[1:])
    wanted = betas**2 / (2 * variance * (1 - betas) * (1 - signal[1:]))
    # One less a signal of nearly 1, in float32: the first keep five digits.
    np.testing.assert_allclose(schedule.table("lvlb_weights")[1:], wanted, rtol=5e-5)
    of_sample = NoiseSchedule(num_timesteps=20, parameterization="x0").table("lvlb_weights")
    wanted = 0.5 * signal[1:] ** 0.5 / (2 - signal[1:])  # as the original has it
    np.testing.assert_allclose(of_sample[1:], wanted, rtol=1e-6)


def test_bound_weights_repeat_the_second_entry_and_are_one_for_velocity():
    for parameterization in ("eps", "x0"):
        weights = NoiseSchedule(parameterization=parameterization).table("lvlb_weights")
        assert weights[0] == weights[1] != weights[2]
    assert (NoiseSchedule(parameterization="v").table("lvlb_weights") == 1).all()


def test_a_shift_divides_the_signal_to_noise_ratio_everywhere():
    a, b = NoiseSchedule().alphas_cumprod64, NoiseSchedule(snr_shift=3.0).alphas_cumprod64
    np.testing.assert_allclose(b / (1 - b) * 3, a / (1 - a), rtol=1e-9)


def test_scale_array_falls_to_base_scale_and_stays():
    schedule = NoiseSchedule(num_timesteps=30, base_scale=0.4, turning_step=10)
    scales = schedule.scale_array
    assert scales.shape == (40,)
    assert scales[0] == 1.0
    np.testing.assert_allclose(scales[:10], 1 - 0.6 * np.arange(10) / 9, rtol=1e-6)
    np.testing.assert_allclose(scales[9:], 0.4, rtol=1e-6)
    assert (NoiseSchedule(num_timesteps=30).scale_array == 1).all()


def test_gather_takes_a_level_per_sample_or_per_frame():
    schedule = NoiseSchedule(num_timesteps=30)
    table = schedule.table("alphas_cumprod")
    per_sample = schedule.gather("alphas_cumprod", np.array([3, 8]), ndim=5)
    assert per_sample.shape == (2, 1, 1, 1, 1)
    per_frame = schedule.gather("alphas_cumprod", np.array([[3, 8, 1], [0, 29, 2]]), ndim=5)
    assert per_frame.shape == (2, 3, 1, 1, 1)
    np.testing.assert_array_equal(np.ravel(per_frame), table[[3, 8, 1, 0, 29, 2]])
    with pytest.raises(ValueError, match="axes"):
        expand(np.zeros((2, 3)), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_timesteps": 1}, "num_timesteps"),
        ({"beta_schedule": "cubic"}, "'cubic'"),
        ({"parameterization": "score"}, "'score'"),
        ({"linear_start": 0.5, "linear_end": 0.1}, "linear_start"),
        ({"base_scale": -1.0}, "base_scale"),
        ({"snr_shift": 0.0}, "snr_shift"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**options)


def test_a_schedule_is_a_value():
    assert NoiseSchedule(base_scale=0.7) == NoiseSchedule(base_scale=0.7)
    assert hash(NoiseSchedule()) != hash(NoiseSchedule(zero_terminal_snr=True))
