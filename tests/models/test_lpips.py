"""LPIPS: full-size parameters, what a distance is, and gradients where a picture is black."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.models.lpips import LPIPS, LPIPSConfig
from dicode_jax.nn.rngs import blank

TINY = LPIPSConfig(widths=((4, 4), (6,), (5, 3)))


def test_the_full_size_is_vgg_16_s_convolutions_and_five_heads():
    state = nnx.state(blank(LPIPS))
    assert sum(x.size for x in jax.tree.leaves(state)) == 14_714_688 + 64 + 128 + 256 + 512 + 512


def test_equal_images_are_at_distance_zero_and_each_pair_counts_alone():
    model = LPIPS(TINY, rngs=nnx.Rngs(0))
    one, two = jax.random.uniform(jax.random.key(1), (2, 3, 16, 16, 3), minval=-1.0)
    np.testing.assert_array_equal(model(one, one), 0.0)
    mixed = model(one, jnp.concatenate([two[:1], one[1:]]))
    assert mixed[0] != 0
    np.testing.assert_allclose(mixed[1:], 0.0, atol=1e-6)


@pytest.mark.long
def test_a_black_picture_has_a_finite_gradient():
    model = LPIPS(TINY, rngs=nnx.Rngs(0))
    zeros = jnp.zeros((1, 16, 16, 3))
    assert jnp.isfinite(jax.grad(lambda x: model(x, zeros + 0.1).sum())(zeros)).all()
