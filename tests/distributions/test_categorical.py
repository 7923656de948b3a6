"""Which tokens are left to draw from, against a count by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.distributions.categorical import keep_top_k, keep_top_p

PROBS = np.array([[0.05, 0.4, 0.3, 0.25], [0.7, 0.1, 0.1, 0.1]], np.float32)
LOGITS = jnp.log(PROBS)


def kept(logits):
    assert ((logits == LOGITS) | (logits == -jnp.inf)).all()
    return np.isfinite(np.asarray(logits)).tolist()


def test_the_likeliest_tokens_stay_and_so_do_their_equals():
    assert kept(keep_top_k(LOGITS, 1)) == [[False, True, False, False], [True, False, False, False]]
    assert kept(keep_top_k(LOGITS, 2)) == [[False, True, True, False], [True, True, True, True]]
    assert kept(jax.jit(keep_top_k)(LOGITS, jnp.float32(99))) == [[True] * 4] * 2


@pytest.mark.parametrize(
    ("p", "first", "second"),
    [(0.01, [1], [0]), (0.39, [1], [0]), (0.41, [1, 2], [0]), (0.75, [1, 2, 3], [0, 1])],
)
def test_tokens_stay_up_to_the_one_that_reaches_the_sum(p, first, second):
    got = kept(jax.jit(keep_top_p)(LOGITS, jnp.float32(p)))
    assert [np.flatnonzero(row).tolist() for row in got] == [first, second]


def test_all_stay_at_one_and_what_is_left_sums_to_one():
    assert kept(keep_top_p(LOGITS, 1.0)) == [[True] * 4] * 2
    probs = jax.nn.softmax(keep_top_p(LOGITS, 0.6))
    np.testing.assert_allclose(probs[0], [0, 4 / 7, 3 / 7, 0], atol=1e-6)
