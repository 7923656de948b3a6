"""Diffusion losses: zeros, weights, levels per frame, offset noise, dynamic rescale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.diffusion import losses
from dicode_jax.diffusion.parameterization import training_target
from dicode_jax.diffusion.schedules import NoiseSchedule

LATENTS = jax.random.normal(jax.random.key(0), (3, 2, 4, 5, 6))
NOISE = jax.random.normal(jax.random.key(1), LATENTS.shape)
T = jnp.array([0, 400, 999])


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_the_right_answer_has_no_loss_and_zero_has_the_power_of_the_target(parameterization):
    schedule = NoiseSchedule(parameterization=parameterization)
    target = training_target(schedule, LATENTS, NOISE, T)
    loss, _ = losses.diffusion_loss(lambda x, t: target, schedule, LATENTS, T, NOISE)
    assert loss == 0
    loss, metrics = losses.diffusion_loss(
        lambda x, t: jnp.zeros_like(x), schedule, LATENTS, T, NOISE
    )
    np.testing.assert_allclose(loss, jnp.square(target).mean(), rtol=1e-6)
    assert metrics["loss_per_sample"].shape == (3,)


def test_bound_weighs_samples_by_their_timestep():
    schedule = NoiseSchedule()
    _, plain = losses.diffusion_loss(lambda x, t: 0 * x, schedule, LATENTS, T, NOISE)
    loss, _ = losses.diffusion_loss(
        lambda x, t: 0 * x, schedule, LATENTS, T, NOISE, simple_weight=0.0, elbo_weight=2.0
    )
    weights = schedule.table("lvlb_weights")[np.asarray(T)]
    expected = 2.0 * np.mean(weights * np.asarray(plain["loss_per_sample"]))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_equal_levels_for_all_frames_equal_one_level_per_sample():
    schedule = NoiseSchedule()
    per_frame = jnp.tile(T[:, None], (1, 2))
    _, once = losses.diffusion_loss(lambda x, t: 0.5 * x, schedule, LATENTS, T, NOISE)
    _, frames = losses.diffusion_loss(lambda x, t: 0.5 * x, schedule, LATENTS, per_frame, NOISE)
    for name in ("loss", "loss_vlb", "loss_per_sample", "x_t"):
        np.testing.assert_allclose(once[name], frames[name], rtol=1e-6)


def test_clean_frames_reach_the_network_without_noise_and_do_not_count():
    schedule = NoiseSchedule(parameterization="v")
    clean = jnp.array([[True, False], [False, False], [False, True]])
    seen = []

    def denoise(x, t):
        seen.append(x)
        return jnp.where(clean[..., None, None, None], 1e3, 0.0) * jnp.ones_like(x)

    loss, metrics = losses.diffusion_loss(denoise, schedule, LATENTS, T, NOISE, clean=clean)
    np.testing.assert_array_equal(seen[0][clean], LATENTS[clean])
    assert not np.any(np.isclose(seen[0][~clean], LATENTS[~clean]).all(axis=-1))
    power = jnp.square(metrics["target"]).mean((2, 3, 4))  # [b, f]
    want = [power[0, 1], power[1].mean(), power[2, 0]]
    np.testing.assert_allclose(metrics["loss_per_sample"], want, rtol=1e-6)
    np.testing.assert_allclose(loss, np.mean(want), rtol=1e-6)


def test_offset_noise_shifts_whole_images():
    key = jax.random.key(3)
    plain = losses.sample_noise(key, LATENTS.shape)
    shifted = losses.sample_noise(key, LATENTS.shape, offset_strength=0.5)
    offset = np.asarray(shifted - plain)
    np.testing.assert_allclose(
        offset, np.broadcast_to(offset[:, :, :1, :1], offset.shape), atol=1e-6
    )
    assert np.unique(offset[:, :, 0, 0].round(5)).size == 3 * 2 * 6


def test_dynamic_rescale_shrinks_latents_of_late_timesteps():
    schedule = NoiseSchedule(base_scale=0.5, turning_step=400)
    got = losses.apply_dynamic_rescale(schedule, LATENTS, T)
    np.testing.assert_allclose(got[0], LATENTS[0], rtol=1e-6)
    np.testing.assert_allclose(got[2], 0.5 * LATENTS[2], rtol=1e-6)
    assert losses.apply_dynamic_rescale(NoiseSchedule(), LATENTS, T) is LATENTS


def test_absolute_error_and_unknown_names():
    np.testing.assert_allclose(
        losses.per_sample_error(LATENTS, jnp.zeros_like(LATENTS), "l1"),
        jnp.abs(LATENTS).mean((1, 2, 3, 4)),
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match="'huber'"):
        losses.per_sample_error(LATENTS, LATENTS, "huber")


@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_numbers_count_by_their_weights(loss_type):
    schedule = NoiseSchedule(parameterization="eps")
    rng = np.random.default_rng(4)
    latents, noise = (rng.normal(size=(2, 3, 4, 4, 2)).astype(np.float32) for _ in range(2))
    times = jnp.array([[1, 500, 900], [3, 3, 3]])
    weights = rng.uniform(0, 2, (2, 3, 4, 4, 1)).astype(np.float32)
    _, metrics = losses.diffusion_loss(
        lambda x, _: jnp.zeros_like(x), schedule, jnp.asarray(latents), times, jnp.asarray(noise),
        loss_type=loss_type, element_weights=jnp.asarray(weights),
    )  # fmt: skip
    errors = weights * (np.square(noise) if loss_type == "l2" else np.abs(noise))
    want = errors.mean((2, 3, 4))
    np.testing.assert_allclose(metrics["loss_per_frame"], want, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], want.mean(), rtol=1e-5)
