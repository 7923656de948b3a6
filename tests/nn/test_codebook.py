"""How codes learn: k-means, averages, revival and the rotation's gradient, by other means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.nn.codebook import Codebook, averaged, revived, rotate, start


def clusters(seed=0, size=40):
    """Vectors around four corners, far apart."""
    rng = np.random.default_rng(seed)
    corners = 10.0 * np.array([[1, 1, 0], [-1, 1, 0], [0, -1, 1], [0, 0, -1]])
    x = corners[rng.integers(4, size=size)] + 0.1 * rng.normal(size=(size, 3))
    return jnp.asarray(x, jnp.float32)


def test_k_means_is_lloyds_from_the_same_vectors():
    x, key = clusters(), jax.random.key(4)
    first = jax.jit(functools.partial(start, count=4, rounds=1))
    got = jax.jit(functools.partial(start, count=4, rounds=3))(x, key)
    x = np.asarray(x, np.float64)
    codes = x[np.asarray(jax.random.permutation(key, len(x)))[:4]]
    for turn in range(3):
        near = np.square(x[:, None] - codes).sum(-1).argmin(1)
        counts = np.bincount(near, minlength=4)
        codes = np.stack([x[near == i].mean(0) if counts[i] else codes[i] for i in range(4)])
        if turn == 0:
            np.testing.assert_allclose(first(jnp.asarray(x), key).codes, codes, rtol=1e-4)
    np.testing.assert_allclose(got.codes, codes, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got.counts, counts)
    np.testing.assert_allclose(got.sums, codes * counts[:, None], rtol=1e-4, atol=1e-4)
    assert bool(got.is_started)


def test_of_fewer_vectors_than_codes_some_start_two():
    book = jax.jit(functools.partial(start, count=5, rounds=1))(clusters(size=3), jax.random.key(0))
    assert book.codes.shape == (5, 3)
    assert np.isfinite(book.codes).all()
    assert book.counts.sum() == 3


def test_codes_are_averages_over_batches():
    """With decay 0.8: 0.8 times what was, 0.2 times the batch."""
    x = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [8.0, 6.0]])
    book = Codebook(jnp.ones((2, 2)), jnp.asarray([5.0, 10.0]), jnp.asarray([[5.0, 5], [10, 10]]))
    got = jax.jit(functools.partial(averaged, decay=0.8))(book, x, jnp.asarray([0, 0, 1]))
    np.testing.assert_allclose(got.counts, [4.4, 8.2], rtol=1e-6)
    np.testing.assert_allclose(got.sums, [[4.8, 5.2], [9.6, 9.2]], rtol=1e-6)
    np.testing.assert_allclose(got.codes, got.sums / got.counts[:, None], rtol=1e-4)


def test_revival_takes_vectors_of_the_batch_and_resets_the_averages():
    x = jnp.arange(12.0).reshape(6, 2)
    book = Codebook(jnp.full((3, 2), 99.0), jnp.asarray([0.5, 3.0, 1.9]), jnp.full((3, 2), 7.0))
    got = jax.jit(functools.partial(revived, below=2.0))(book, x, jax.random.key(1))
    np.testing.assert_array_equal(got.counts, [2.0, 3.0, 2.0])
    np.testing.assert_array_equal(got.codes[1], [99.0, 99.0])
    np.testing.assert_array_equal(got.sums[1], [7.0, 7.0])
    rows = {tuple(row) for row in np.asarray(x).tolist()}
    fresh = [tuple(np.asarray(got.codes)[i].tolist()) for i in (0, 2)]
    assert set(fresh) <= rows
    assert fresh[0] != fresh[1]
    for i in (0, 2):  # else the next average would pull the code back to where it died
        np.testing.assert_array_equal(got.sums[i], 2.0 * got.codes[i])


def test_the_gradient_is_that_of_the_rotation_and_scaling_from_token_to_code():
    rng = np.random.default_rng(3)
    x, q, g = rng.normal(size=(3, 5, 4))
    out, back = jax.vjp(rotate, jnp.asarray(x, jnp.float32), jnp.asarray(q, jnp.float32))
    np.testing.assert_allclose(out, q, atol=1e-5)
    of_x, of_q = back(jnp.asarray(g, jnp.float32))
    np.testing.assert_array_equal(of_q, 0)
    for i in range(5):
        u, v = x[i] / np.linalg.norm(x[i]), q[i] / np.linalg.norm(q[i])
        # The rotation in the plane of both, by its own formula: all else stays.
        w = v - (u @ v) * u
        w /= np.linalg.norm(w)
        cos, sin = u @ v, w @ v
        turn = np.eye(4) + (cos - 1) * (np.outer(u, u) + np.outer(w, w))
        turn += sin * (np.outer(w, u) - np.outer(u, w))
        want = np.linalg.norm(q[i]) / np.linalg.norm(x[i]) * turn.T @ g[i]
        np.testing.assert_allclose(of_x[i], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("x", [[0.0, 0.0], [-3.0, 0.0]])
def test_a_token_at_zero_or_opposite_to_its_code_has_a_finite_gradient(x):
    q = jnp.asarray([[1.0, 0.0]])
    grad = jax.grad(lambda x: rotate(x, q).sum())(jnp.asarray([x]))
    assert np.isfinite(grad).all()


def test_perplexity_counts_codes_that_are_used_alike():
    book = Codebook(jnp.zeros((4, 1)), jnp.asarray([3.0, 3.0, 0.0, 0.0]), jnp.zeros((4, 1)))
    np.testing.assert_allclose(book.perplexity, 2.0, rtol=1e-5)
