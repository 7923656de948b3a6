"""Guidance: limits and the spread after rescaling."""

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.guidance import guide, rescale_guidance

COND, UNCOND = jax.random.normal(jax.random.key(0), (2, 2, 3, 4, 5, 6))


def test_scale_one_is_conditional_and_zero_unconditional():
    np.testing.assert_allclose(guide(COND, UNCOND, 1.0), COND, atol=1e-6)
    np.testing.assert_array_equal(guide(COND, UNCOND, 0.0), UNCOND)


def test_full_rescale_gives_each_sample_the_conditional_spread():
    guided = jnp.stack([3.0 * COND[0], 0.2 * COND[1] + 1.0])
    got = rescale_guidance(guided, COND, 1.0)
    for i in range(2):
        spread = np.std(np.asarray(COND[i]), ddof=1)
        np.testing.assert_allclose(np.std(np.asarray(got[i]), ddof=1), spread, rtol=1e-5)
    np.testing.assert_array_equal(rescale_guidance(guided, COND, 0.0), guided)


def test_a_prediction_without_spread_stays_as_it_is():
    guided = jnp.stack([jnp.zeros((3, 4)), jnp.full((3, 4), 2.0), jnp.ones((3, 4))])
    cond = jnp.stack([jnp.zeros((3, 4)), jnp.full((3, 4), 5.0), COND[0, 0, :3, :4, 0]])
    np.testing.assert_array_equal(rescale_guidance(guided, cond, 1.0), guided)
    np.testing.assert_array_equal(rescale_guidance(guided, cond, 0.7), guided)
    single = jnp.ones((2, 1))  # of which there is no unbiased spread
    np.testing.assert_array_equal(rescale_guidance(single, single, 1.0), single)
