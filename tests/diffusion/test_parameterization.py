"""eps, x0 and v: round trips, limits, levels per frame."""

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion import parameterization as P
from dicode_jax.diffusion.schedules import NoiseSchedule

SNR0 = NoiseSchedule(zero_terminal_snr=True, parameterization="v")
X0 = jax.random.normal(jax.random.key(0), (2, 3, 4, 5, 6))
NOISE = jax.random.normal(jax.random.key(1), X0.shape)


def levels(schedule, timesteps):
    names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    return [schedule.gather(name, timesteps, X0.ndim) for name in names]


def test_velocity_gives_back_sample_and_noise_at_every_level():
    for t in (0, 500, 999):
        timesteps = jnp.array([t, 17])
        x_t = P.add_noise(SNR0, X0, NOISE, timesteps)
        v = P.velocity(SNR0, X0, NOISE, timesteps)
        x0, eps = P.x0_and_eps("v", x_t, v, *levels(SNR0, timesteps))
        np.testing.assert_allclose(x0, X0, atol=2e-6)
        np.testing.assert_allclose(eps, NOISE, atol=2e-6)


def test_at_zero_snr_the_noisy_sample_is_noise_and_velocity_is_minus_the_sample():
    last = jnp.array([999, 999])
    np.testing.assert_array_equal(P.add_noise(SNR0, X0, NOISE, last), NOISE)
    np.testing.assert_array_equal(P.velocity(SNR0, X0, NOISE, last), -X0)


def test_noise_gives_back_the_sample_and_the_sample_the_noise():
    schedule, t = NoiseSchedule(), jnp.array([30, 600])
    x_t = P.add_noise(schedule, X0, NOISE, t)
    x0, eps = P.x0_and_eps("eps", x_t, NOISE, *levels(schedule, t))
    np.testing.assert_allclose(x0, X0, atol=5e-6)
    assert eps is NOISE
    x0, eps = P.x0_and_eps("x0", x_t, X0, *levels(schedule, t))
    np.testing.assert_allclose(eps, NOISE, atol=5e-6)
    assert x0 is X0


def test_levels_per_frame_equal_frames_on_their_own():
    t = jnp.array([[3, 400, 999], [0, 17, 250]])
    whole = P.velocity(SNR0, X0, NOISE, t)
    for frame in range(3):
        alone = P.velocity(SNR0, X0[:, frame], NOISE[:, frame], t[:, frame])
        np.testing.assert_array_equal(whole[:, frame], alone)


def test_the_target_is_what_the_schedule_says():
    t = jnp.array([5, 900])
    targets = {
        name: P.training_target(NoiseSchedule(parameterization=name), X0, NOISE, t)
        for name in ("eps", "x0", "v")
    }
    assert targets["eps"] is NOISE
    assert targets["x0"] is X0
    np.testing.assert_array_equal(targets["v"], P.velocity(NoiseSchedule(), X0, NOISE, t))
