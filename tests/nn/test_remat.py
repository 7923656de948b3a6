"""Rematerialisation policies: equal gradients, and how much is computed again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax import config as config_lib
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.nn.remat import checkpoint

W = jax.random.normal(jax.random.key(0), (5, 5))
X = jax.random.normal(jax.random.key(1), (3, 4, 5))


def layer(w, x):
    x = jnp.tanh(x @ w)  # a matrix product without a batch axis
    return jnp.tanh(jnp.einsum("btd,bsd->bts", x, x)) @ x  # and two with one


def matrix_products(remat):
    loss = lambda w: jnp.square(checkpoint(layer, remat)(w, X)).sum()  # noqa: E731
    return str(jax.make_jaxpr(jax.grad(loss))(W)).count("dot_general")


def test_policies_store_less_and_less():
    counts = [matrix_products(name) for name in ("none", "dots", "dots_no_batch", "full")]
    # `dots` stores all three products, the next one that without a batch axis, the last none
    assert counts == [counts[0], counts[0], counts[0] + 1, counts[0] + 2]


@pytest.mark.parametrize("remat", ["dots", "dots_no_batch", "full", True])
def test_gradients_are_the_same(remat):
    grad = lambda remat: jax.grad(lambda w: jnp.square(checkpoint(layer, remat)(w, X)).sum())(W)  # noqa: E731
    np.testing.assert_allclose(grad(remat), grad("none"), rtol=1e-5, atol=1e-5)


def test_unknown_policy_is_named():
    with pytest.raises(ValueError, match="unknown remat 'dot'; known are none, full"):
        checkpoint(layer, "dot")


@pytest.mark.parametrize("remat", [True, False, "dots_no_batch"])
def test_configs_take_names_and_the_older_switch(remat, tmp_path):
    config = GPT2Config(remat=remat)
    config_lib.to_json(config, tmp_path / "config.json")
    assert config_lib.from_json(GPT2Config, tmp_path / "config.json").remat == remat
    read = config_lib.from_args(GPT2Config, ["--remat", str(remat)])
    assert read.remat == remat
