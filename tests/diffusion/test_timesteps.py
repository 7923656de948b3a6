"""Draws of timesteps have the chances that are worked out exactly."""

import itertools

import jax
import numpy as np
import pytest

from dicode_jax.diffusion import timesteps
from dicode_jax.diffusion.timesteps import draw_timesteps, marginals, path_counts

NUM = 40_000


def all_paths(k, f):
    return np.array(list(itertools.combinations_with_replacement(range(k), f)))


def test_path_counts_are_the_numbers_of_paths():
    starts, ends = path_counts(5, 3)
    paths = all_paths(5, 3)
    for t, f in itertools.product(range(5), range(3)):
        through = paths[paths[:, f] == t]
        assert starts[t, f] == len(np.unique(through[:, f:], axis=0))
        assert ends[t, f] == len(np.unique(through[:, : f + 1], axis=0))


@pytest.mark.parametrize("mode", timesteps.MODES)
def test_every_timestep_of_every_frame_comes_as_often_as_worked_out(mode):
    k, f = 9, 4
    drawn = np.asarray(draw_timesteps(jax.random.key(3), mode, k, f, NUM))
    assert drawn.shape == (NUM, f)
    assert drawn.dtype == np.int32
    got = np.stack([np.bincount(frame, minlength=k) for frame in drawn.T]) / NUM
    want = marginals(mode, k, f)
    np.testing.assert_allclose(want.sum(axis=1), 1, rtol=1e-12)
    spread = np.sqrt(want * (1 - want) / NUM)
    assert np.abs(got - want).max() <= 4.5 * spread.max()
    assert (np.abs(got - want) <= 4.5 * spread + 1e-3).all()
    if mode in ("fopp", "uniform_paths"):
        assert (np.diff(drawn, axis=1) >= 0).all()


def test_whole_paths_come_as_often_as_worked_out():
    k, f = 4, 3
    paths = all_paths(k, f)
    starts, ends = path_counts(k, f)
    through = (starts * ends)[paths, np.arange(f)]
    chances = {
        "fopp": (1 / through).sum(axis=1) / (f * k),
        "uniform_paths": np.full(len(paths), 1 / len(paths)),
    }
    for mode, want in chances.items():
        drawn = np.asarray(draw_timesteps(jax.random.key(1), mode, k, f, NUM))
        base = k ** np.arange(f)
        got = np.bincount(drawn @ base, minlength=k**f)[paths @ base] / NUM
        np.testing.assert_allclose(want.sum(), 1, rtol=1e-12)
        np.testing.assert_allclose(got, want, atol=5 * np.sqrt(want.max() / NUM))


def test_float32_keeps_the_ratios_of_the_released_sizes():
    k, f = 1000, 16
    drawn = np.asarray(draw_timesteps(jax.random.key(0), "fopp", k, f, NUM))
    want = marginals("fopp", k, f)
    means = want @ np.arange(k)
    spread = np.sqrt(want @ np.square(np.arange(k)) - means**2)
    np.testing.assert_allclose(drawn.mean(axis=0), means, atol=5 * spread.max() / np.sqrt(NUM))
    np.testing.assert_allclose(means[[0, 7, 8, 15]], [105.5, 479, 520, 893], atol=1)
    assert k * want.min() >= 1 / f - 1e-9  # what balanced means
    noisy = (drawn[:, 0] >= 900).mean()
    assert abs(noisy - want[0, 900:].sum()) < 5 * np.sqrt(6.6e-3 / NUM)


def test_marginals_mirror_each_other():
    for mode in ("fopp", "uniform_paths"):
        table = marginals(mode, 12, 5)
        np.testing.assert_allclose(table, table[::-1, ::-1], rtol=1e-10)


def test_a_clip_depends_on_its_own_key_alone():
    keys = jax.random.split(jax.random.key(5), 6)
    whole = draw_timesteps(keys, "fopp", 50, 4, 6)
    part = draw_timesteps(keys[2:4], "fopp", 50, 4, 2)
    np.testing.assert_array_equal(whole[2:4], part)


def test_shared_timesteps_are_one_for_all_frames():
    drawn = np.asarray(draw_timesteps(jax.random.key(0), "shared", 100, 5, 7))
    assert (drawn == drawn[:, :1]).all()
    assert len(np.unique(drawn[:, 0])) > 1


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="fopp, uniform_paths, independent, shared"):
        draw_timesteps(jax.random.key(0), "none", 10, 2, 1)


def test_more_paths_than_a_float64_holds_are_refused():
    with pytest.raises(ValueError, match="fewer frames"):
        path_counts(1000, 900)
