"""Causal convolutions: chunks are the whole, nothing later is seen, both forms are one."""

import jax
import numpy as np
from flax import nnx

from dicode_jax.nn.causal_conv import CausalConv, Past
from dicode_jax.runtime.platform import tracing_for

X = jax.random.normal(jax.random.key(0), (2, 5, 3, 4, 6))
CONV = CausalConv(6, 7, rngs=nnx.Rngs(0))


def test_chunks_are_the_whole_and_a_frame_sees_none_behind_it():
    whole = CONV(X, Past())
    past, parts = None, []
    for chunk in (X[:, :3], X[:, 3:4], X[:, 4:]):
        now = Past(past)
        parts.append(CONV(chunk, now))
        past = now.left
        assert past[0].shape == (2, 2, 3, 4, 6)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)


def test_the_form_of_cpus_is_the_convolution():
    on_cpu = CONV(X, Past())
    with tracing_for(platform="gpu"):
        np.testing.assert_allclose(CONV(X, Past()), on_cpu, atol=1e-5)
