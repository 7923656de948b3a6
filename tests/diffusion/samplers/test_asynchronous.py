"""Frames at steps of their own: each ends as it would alone, and those that rest do not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.diffusion.asynchronous import sample_frames
from dicode_jax.diffusion.frame_schedule import frame_schedule
from dicode_jax.diffusion.samplers.asynchronous import AsynchronousDDIM
from dicode_jax.diffusion.samplers.base import sample
from dicode_jax.diffusion.samplers.ddim import DDIM
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.diffusion.time_grid import ddim_time_grid, ddim_timesteps

STEPS, FRAMES = 6, 5


def make(kind="x0", **options):
    schedule = NoiseSchedule(linear_start=1e-4, linear_end=2e-2, parameterization=kind)
    steps = tuple(ddim_timesteps("uniform", STEPS))
    return AsynchronousDDIM(schedule=schedule, timesteps=steps, **options)


def denoise(x, times, step):
    """Something that depends on sample and time of a frame alone."""
    del step
    told = times.astype(jnp.float32)[..., None, None]
    return 0.3 * jnp.tanh(x) + 0.1 * jnp.cos(told / 100) - 0.05 * x


def noise(frames=FRAMES):
    return jax.random.normal(jax.random.key(0), (2, frames, 3, 4))


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
@pytest.mark.parametrize("lag", [0, 2, STEPS])
def test_each_frame_ends_as_plain_ddim_brings_it(kind, lag):
    sampler, x = make(kind), noise()
    frames = frame_schedule(FRAMES, STEPS, lag, window=FRAMES)
    got, _ = sample_frames(denoise, sampler, x, frames)
    grid = np.repeat(ddim_time_grid("uniform", STEPS)[:, None], FRAMES, axis=1)
    want, _ = sample(denoise, DDIM(schedule=sampler.schedule, eta=0.0), x, grid)
    np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_frames_that_rest_stay_bit_for_bit(kind):
    x = noise()
    frames = frame_schedule(FRAMES, STEPS, 3, window=FRAMES)
    _, states = sample_frames(denoise, make(kind), x, frames, return_trajectory=True)
    path = np.concatenate([x[None], states.x])
    rests = ~frames.moves
    for row, frame in zip(*np.nonzero(rests), strict=True):
        np.testing.assert_array_equal(path[row, :, frame], path[row + 1, :, frame])
    assert rests.any()
    assert not np.array_equal(path[0], path[-1])


def test_drift_makes_finished_frames_grow_as_in_the_original():
    frames, x = frame_schedule(FRAMES, STEPS, 3, window=FRAMES), noise()
    _, states = sample_frames(denoise, make(drift=True), x, frames, return_trajectory=True)
    rows = np.arange(STEPS - 1, len(frames.moves))
    growth = np.asarray(states.x[rows, 0, 0]) / np.asarray(states.x[rows[0], 0, 0])
    want = (1 + 2.118e-5) ** (rows - rows[0])
    np.testing.assert_allclose(
        growth, np.broadcast_to(want[:, None, None], growth.shape), rtol=2e-6
    )


def test_a_window_that_moves_gives_what_the_whole_video_gives():
    frames, x = frame_schedule(9, STEPS, 2, window=3), noise(9)
    seen = []

    def watched(x, times, step):
        seen.append(x.shape)
        return denoise(x, times, step)

    got, _ = sample_frames(watched, make(), x, frames)
    want, _ = sample_frames(denoise, make(), x, frame_schedule(9, STEPS, 2, window=9))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert set(seen) == {(2, 3, 3, 4)}


def test_given_frames_come_back_bit_for_bit_and_are_seen_under_their_noise():
    x, given = noise(), jax.random.normal(jax.random.key(1), (2, 2, 3, 4))
    frames = frame_schedule(FRAMES, STEPS, 2, window=FRAMES, num_given=2)
    shown = []

    def mean_of_all(x, times, step):
        jax.debug.callback(lambda *a: shown.append(a), x[:, :2], times[:, :2])
        return jnp.broadcast_to(x.mean(axis=1, keepdims=True), x.shape)

    history = jax.random.normal(jax.random.key(2), x.shape)
    plain, _ = sample_frames(mean_of_all, make(), x, frames, given=given)
    jax.effects_barrier()
    assert all(np.array_equal(a, given) and (t == 1).all() for a, t in shown)
    shown.clear()
    noisy, _ = sample_frames(
        mean_of_all, make(), x, frames, given=given, history_noise=300, history=history
    )
    jax.effects_barrier()
    assert all((t == 300).all() for _, t in shown)
    level = make().schedule.alphas_cumprod64[300]
    want = np.sqrt(level) * given + np.sqrt(1 - level) * history[:, :2]
    assert all(np.allclose(a, want, atol=1e-6) for a, _ in shown)
    for got in (plain, noisy):
        np.testing.assert_array_equal(got[:, :2], given)
    assert not np.allclose(plain[:, 2:], noisy[:, 2:])


def test_finished_frames_are_seen_under_the_noise_of_history_and_stay():
    x, shown = noise(3), []

    def watched(x, times, step):
        jax.debug.callback(lambda *a: shown.append(a), x[:, 0], times[:, 0], step, ordered=True)
        return denoise(x, times, step)

    frames, history = frame_schedule(3, STEPS, STEPS, window=3), noise(3)[::-1]
    options = {"history_noise": 300, "history": history}
    got, _ = sample_frames(watched, make(), x, frames, **options)
    plain, _ = sample_frames(denoise, make(), x, frames)
    jax.effects_barrier()
    np.testing.assert_allclose(got, plain, atol=1e-6)  # as no frame looks at another here
    level = make().schedule.alphas_cumprod64[300]
    want = np.sqrt(level) * got[:, 0] + np.sqrt(1 - level) * history[:, 0]
    for a, t, step in shown:
        assert (t == 300).all() == (step >= STEPS)
        assert np.allclose(a, want, atol=1e-6) == (step >= STEPS)
    with pytest.raises(ValueError, match="needs history"):
        sample_frames(denoise, make(), x, frames, history_noise=300)


def test_steps_outside_of_the_grid_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.6, got 0\.\.7"):
        make().coefficients(np.array([[0], [7]]))
