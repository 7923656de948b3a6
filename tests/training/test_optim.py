"""Optimisers: which parameters Muon takes, and what its steps look like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.training.optim import OptimConfig, make_optimizer

PARAMS = {
    "linear": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)},
    "conv": {"kernel": jnp.ones((3, 3, 4, 4))},
    "stacked": {"kernel": jnp.ones((2, 8, 6))},
    "embed": jnp.ones((5, 6)),
}


def step(optimizer: str, **options):
    config = OptimConfig(
        optimizer=optimizer, lr=0.01, warmup_steps=0, schedule="constant", **options
    )
    tx = make_optimizer(config, 10)
    keys = iter(jax.random.split(jax.random.key(0), 5))
    grads = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    return updates


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_muon_step_of_a_kernel_is_orthogonal_and_as_large_as_adams(layer):
    update = np.asarray(step("muon", weight_decay=0.0)[layer]["kernel"])
    update = update.reshape(-1, update.shape[-1])
    singular = np.linalg.svd(update, compute_uv=False)
    assert singular.max() / singular.min() < 2  # a random gradient's: about 5
    np.testing.assert_allclose(np.sqrt(np.mean(update**2)), 0.2 * 0.01, rtol=0.3)


def test_muon_steps_stacked_layers_one_by_one():
    for update in np.asarray(step("muon", weight_decay=0.0)["stacked"]["kernel"]):
        singular = np.linalg.svd(update, compute_uv=False)
        assert singular.max() / singular.min() < 2


@pytest.mark.parametrize("path", [("linear", "bias"), ("embed",)])
def test_muon_leaves_everything_else_to_adam(path):
    update = step("muon")
    for name in path:
        update = update[name]
    sizes = np.abs(update)  # Adam's first step is lr * sign(gradient), with Nesterov times 1.48
    np.testing.assert_allclose(sizes, 0.01 * (1 + 0.9 * 0.1 / (1 - 0.9**2)), rtol=2e-2)


@pytest.mark.parametrize(
    ("optimizer", "kept"), [("adamw", ["linear.bias"]), ("muon", ["linear.bias", "embed"])]
)
def test_weight_decay_spares_what_it_should(optimizer, kept):
    with_decay = step(optimizer, weight_decay=0.1)
    without = step(optimizer, weight_decay=0.0)
    same = jax.tree.map(np.allclose, with_decay, without)
    flat = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in
            jax.tree_util.tree_leaves_with_path(same)}  # fmt: skip
    assert sorted(name for name, value in flat.items() if value) == sorted(kept)
