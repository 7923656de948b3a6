"""Optimisers: which parameters Muon takes, and what its steps look like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.training.optim import OptimConfig, make_optimizer

PARAMS = {
    "linear": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)},
    "conv": {"kernel": jnp.ones((3, 3, 4, 4))},
    "embed": jnp.ones((5, 6)),
}


def step(optimizer: str, **options):
    config = OptimConfig(
        optimizer=optimizer, lr=0.01, warmup_steps=0, schedule="constant", **options
    )
    tx = make_optimizer(config, 10)
    keys = iter(jax.random.split(jax.random.key(0), 4))
    grads = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    return updates


def test_muon_step_of_a_linear_kernel_is_orthogonal_and_as_large_as_adams():
    update = np.asarray(step("muon", weight_decay=0.0)["linear"]["kernel"])
    singular = np.linalg.svd(update, compute_uv=False)
    assert singular.max() / singular.min() < 2  # a random gradient's: about 5
    np.testing.assert_allclose(np.sqrt(np.mean(update**2)), 0.2 * 0.01, rtol=0.3)


@pytest.mark.parametrize("path", [("linear", "bias"), ("conv", "kernel"), ("embed",)])
def test_muon_leaves_everything_else_to_adam(path):
    update = step("muon")
    for name in path:
        update = update[name]
    sizes = np.abs(update)  # Adam's first step is lr * sign(gradient), with Nesterov times 1.48
    np.testing.assert_allclose(sizes, 0.01 * (1 + 0.9 * 0.1 / (1 - 0.9**2)), rtol=2e-2)


@pytest.mark.parametrize(
    ("optimizer", "decayed"),
    [("adamw", {"linear.kernel", "conv.kernel", "embed"}), ("muon", {"linear.kernel"})],
)
def test_weight_decay_reaches_what_it_should(optimizer, decayed):
    with_decay = step(optimizer, weight_decay=0.1)
    without = step(optimizer, weight_decay=0.0)
    changed = jax.tree.map(lambda a, b: not np.allclose(a, b), with_decay, without)
    flat = {"linear." + k: v for k, v in changed["linear"].items()}
    flat |= {"conv.kernel": changed["conv"]["kernel"], "embed": changed["embed"]}
    assert {name for name, value in flat.items() if value} == decayed
