"""Draws of unit length, and a divergence that no call changes."""

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.distributions.diagonal_gaussian import DiagonalGaussian
from dicode_jax.distributions.projected_gaussian import ProjectedGaussian, unit

MOMENTS = jax.random.normal(jax.random.key(0), (3, 5, 8))


def test_draws_are_the_gaussian_s_own_scaled_to_length_one():
    inner = DiagonalGaussian.from_moments(MOMENTS)
    outer, key = ProjectedGaussian(inner), jax.random.key(1)
    for got, raw in ((outer.sample(key), inner.sample(key)), (outer.mode(), inner.mean)):
        raw = np.asarray(raw, np.float64)
        want = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_noise_of_a_fixed_size_lies_around_the_directions_whatever_the_posterior_s_own():
    outer = ProjectedGaussian(DiagonalGaussian.from_moments(MOMENTS))
    noise = jax.random.normal(jax.random.key(1), (3, 5, 4))
    got = outer.around(0.25).sample(noise=noise)
    np.testing.assert_allclose(got, unit(outer.mode() + 0.25 * noise), atol=1e-6)
    np.testing.assert_allclose(outer.around(0.0).sample(noise=noise), outer.mode(), atol=1e-6)


def test_the_divergence_stays_that_of_the_raw_mean():
    inner = DiagonalGaussian.from_moments(MOMENTS)
    outer = ProjectedGaussian(inner)
    outer.mode()
    np.testing.assert_array_equal(outer.kl(), inner.kl())


def test_a_vector_of_zeros_stays_and_has_a_gradient():
    grad = jax.grad(lambda x: unit(x).sum())(jnp.zeros((2, 4)))
    assert jnp.isfinite(grad).all()
    np.testing.assert_array_equal(unit(jnp.zeros((2, 4))), 0.0)
