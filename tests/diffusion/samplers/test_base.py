"""The sampling loop: what the protocol lets a sampler do that none of the present ones does."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.samplers.base import sample

X = jnp.zeros((2, 3, 4))


class Counting(NamedTuple):
    x: jnp.ndarray
    x0: jnp.ndarray
    moved: jnp.ndarray  # how often, of each frame


class Staggered:
    """Frames move one after the other; the network is told 999 for those that wait."""

    is_stochastic = False

    def coefficients(self, grid):
        moves = grid[1:] < grid[:-1]
        return np.where(moves, grid[:-1], 999), {"moves": moves, "level": grid[1:]}

    def init(self, x):
        return Counting(x, x, jnp.zeros(x.shape[:2], jnp.int32))

    def step(self, state, prediction, coefficients, noise):
        moves = coefficients["moves"]
        x = jnp.where(moves[..., None], prediction, state.x)
        return Counting(x, prediction, state.moved + moves.astype(jnp.int32))


def test_times_state_and_frozen_frames_are_the_samplers_own():
    grid = np.array([[9, 9, 9], [5, 9, 9], [2, 5, 9], [2, 2, 9]])
    seen = lambda x, times, step: x + times[..., None].astype(x.dtype)  # noqa: E731
    for use_scan in (True, False):
        got, steps = sample(seen, Staggered(), X, grid, return_trajectory=True, use_scan=use_scan)
        told = np.array([[9, 999, 999], [5, 9, 999], [999, 5, 999]])
        x_before = np.stack([X, *steps.x[:-1]])
        np.testing.assert_array_equal((steps.x0 - x_before)[:, 0, :, 0], told)
        np.testing.assert_array_equal(got[1, :, 0], [14, 14, 0])
        np.testing.assert_array_equal(steps.moved[-1], [[2, 2, 0]] * 2)


def test_the_loop_is_one_scan_unless_told_otherwise():
    grid = np.array([[9, 9, 9], [5, 9, 9], [2, 5, 9]])
    run = lambda x, **options: sample(lambda x, *_: x + 1, Staggered(), x, grid, **options)[0]  # noqa: E731
    assert "scan" in str(jax.make_jaxpr(run)(X))
    assert "scan" not in str(jax.make_jaxpr(lambda x: run(x, use_scan=False))(X))
