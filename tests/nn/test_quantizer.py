"""Codes against distances by hand."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.nn.quantizer import Quantizer, nearest


def test_the_nearest_code_is_found_and_of_equals_the_first():
    rng = np.random.default_rng(0)
    x, codes = rng.normal(size=(2, 3, 4)), rng.normal(size=(7, 4))
    codes[5] = codes[2]
    distances = np.linalg.norm(x[:, :, None] - codes, axis=-1)
    got = nearest(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), jnp.asarray(codes, jnp.float32))
    np.testing.assert_array_equal(got, distances.argmin(-1))
    same = nearest(jnp.asarray(codes, jnp.float32), jnp.asarray(codes, jnp.float32))
    assert same.tolist() == [0, 1, 2, 3, 4, 2, 6]


def test_a_code_comes_back_projected():
    quantizer = Quantizer(6, num_codes=7, code_dim=4, rngs=nnx.Rngs(0))
    ids = jnp.asarray([[3, 0]])
    want = quantizer.codes[...][ids] @ quantizer.project_out.kernel[...]
    np.testing.assert_allclose(quantizer.decode(ids), want, atol=1e-6)
    assert quantizer.encode(jnp.ones((2, 5, 6))).shape == (2, 5)
