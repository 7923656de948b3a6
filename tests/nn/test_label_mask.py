"""Attention whose mask is made of labels, block by block, against the whole mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.nn import attention
from dicode_jax.nn.attention import dot_product_attention
from dicode_jax.nn.masks import LabelMask
from dicode_jax.nn.rotary import axial_tables, rotary_frequencies, rotary_tables

Q, K, V = (jax.random.normal(jax.random.key(i), (2, n, 3, 4)) for i, n in enumerate((7, 9, 9)))


def sees(query, key):
    return key[..., 0] <= query[..., 0]


MASK = LabelMask(jnp.arange(7)[:, None] * 2, jnp.arange(9)[:, None], sees)


@pytest.mark.parametrize("rows", [3, 7])
def test_blocks_of_queries_give_the_same_values_and_gradients(rows, monkeypatch):
    monkeypatch.setattr(attention, "BLOCKED_SCORES", rows * 2 * 3 * 9)

    def run(mask, q, k, v):
        return dot_product_attention(q, k, v, mask=mask)

    def both(mask):
        total = lambda *args: jnp.sin(run(mask, *args)).sum()  # noqa: E731
        return jax.jit(lambda *args: (run(mask, *args), jax.grad(total, (0, 1, 2))(*args)))

    dense = jnp.tril(jnp.ones((14, 9), bool))[::2][None, None]
    for got, want in zip(*map(jax.tree.leaves, (both(MASK)(Q, K, V), both(dense)(Q, K, V)))):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_no_array_of_all_queries_and_keys_is_made(monkeypatch):
    monkeypatch.setattr(attention, "BLOCKED_SCORES", 3 * 2 * 3 * 9)
    program = jax.make_jaxpr(lambda *args: dot_product_attention(*args, mask=MASK))(Q, K, V)
    assert "3,9]" in str(program)
    assert "7,9]" not in str(program)


def test_it_goes_with_nothing_that_it_would_lose():
    with pytest.raises(ValueError, match="no dropout, bias or groups"):
        dot_product_attention(Q, K[:, :, :1], V[:, :, :1], mask=MASK)
    with pytest.raises(ValueError, match="not both"):
        dot_product_attention(Q, K, V, mask=MASK, causal=True)


def test_each_axis_turns_its_own_channels():
    positions = jnp.asarray([[0, 5], [3, 1], [2, 2]])
    freqs = [rotary_frequencies(width, theta=100.0) for width in (4, 6)]
    cos, sin = axial_tables(positions, freqs)
    assert cos.shape == (1, 3, 5)
    for axis, at in ((0, slice(0, 2)), (1, slice(2, 5))):
        want = rotary_tables(positions[None, :, axis], freqs[axis])
        np.testing.assert_array_equal(cos[..., at], want[0])
        np.testing.assert_array_equal(sin[..., at], want[1])
