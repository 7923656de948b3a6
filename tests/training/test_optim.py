"""Optimisers: which parameters Muon takes, and what its steps look like."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dicode_jax.training.optim import OptimConfig, make_optimizer, make_schedule

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


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_muon_step_of_a_kernel_is_orthogonal_and_as_large_as_adams(layer):
    update = np.asarray(step("muon", weight_decay=0.0)[layer]["kernel"])
    update = update.reshape(-1, update.shape[-1])
    singular = np.linalg.svd(update, compute_uv=False)
    assert singular.max() / singular.min() < 2  # a random gradient's: about 5
    # Five steps of Newton-Schulz leave singular values between 0.7 and 1.2.
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
    np.testing.assert_allclose(sizes, 0.01 * (1 + 0.9 * 0.1 / (1 - 0.9**2)), rtol=1e-4)  # eps


# One layer after another, and the same numbers as one stack.
LAYERS = [
    {"attn": {"kernel": 1.0 + i + jnp.arange(12.0).reshape(4, 3) / 7, "bias": jnp.arange(3.0) + i},
     "norm": {"scale": jnp.ones(4) * (i + 2), "bias": jnp.ones(4) / (i + 1)}}
    for i in range(3)
]  # fmt: skip
TABLES = {"embedding": jnp.ones((5, 4)), "pos_embed": jnp.ones((2, 4)), "latents": jnp.ones((2, 4))}


def steps(optimizer, blocks, grads, count=3):
    """What the parameters are after a few steps; no clipping, which sums in another order."""
    config = OptimConfig(
        optimizer=optimizer, lr=0.01, warmup_steps=0, schedule="constant", weight_decay=0.5,
        clip_norm=0.0,
    )  # fmt: skip
    tx = make_optimizer(config, 10)
    params = {"blocks": blocks, "tables": TABLES}
    grads = {"blocks": grads, "tables": jax.tree.map(jnp.zeros_like, TABLES)}
    state = tx.init(params)
    for _ in range(count):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def stack(layers):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *layers)


ONE_BY_ONE = ["adamw", "lion", "sgd"]  # number by number, where those of a kernel act together


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    ["muon", "adafactor", *(pytest.param(x, marks=pytest.mark.long) for x in ONE_BY_ONE)],
)
def test_stacked_layers_take_the_steps_of_single_ones(optimizer):
    keys = iter(jax.random.split(jax.random.key(0), 100))
    grads = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), LAYERS)
    single = steps(optimizer, LAYERS, grads)
    stacked = steps(optimizer, stack(LAYERS), stack(grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        stacked["blocks"],
        stack(single["blocks"]),
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "adafactor", "sgd"])
@pytest.mark.parametrize("layers", [LAYERS, stack(LAYERS)], ids=["loop", "scan"])
def test_weight_decay_takes_kernels_alone(optimizer, layers):
    """Without gradients nothing but the decay moves a parameter."""
    after = steps(optimizer, layers, jax.tree.map(jnp.zeros_like, layers), count=1)
    before = {"blocks": layers, "tables": TABLES}
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(before), strict=True
    ):
        decay = 0.01 * 0.5 if "kernel" in jax.tree_util.keystr(path) else 0.0
        np.testing.assert_allclose(new, (1 - decay) * old, rtol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "sgd"])
def test_decay_takes_the_learning_rate_times_the_weight(optimizer):
    with_decay = step(optimizer, weight_decay=0.1)["linear"]["kernel"]
    without = step(optimizer, weight_decay=0.0)["linear"]["kernel"]
    np.testing.assert_allclose(with_decay - without, -0.01 * 0.1, rtol=1e-5)  # weights of 1


def test_first_steps_are_those_of_the_papers():
    grads = jax.random.normal(jax.random.key(1), (5, 6))
    for optimizer, wanted in [
        ("lion", -0.01 * np.sign(grads)),
        ("sgd", -0.01 * (1 + 0.9) * np.asarray(grads)),  # Nesterov looks one step ahead
    ]:
        config = OptimConfig(
            optimizer=optimizer, lr=0.01, warmup_steps=0, schedule="constant", clip_norm=0.0,
            weight_decay=0.0,
        )  # fmt: skip
        tx = make_optimizer(config, 10)
        params = jnp.ones((5, 6))
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(updates, wanted, rtol=1e-5)


def test_adamw_steps_are_those_of_the_paper():
    """Adam of bias-corrected moments; the decay and the rate of the step come after."""
    config = OptimConfig(
        lr=0.01, warmup_steps=2, schedule="constant", b1=0.8, b2=0.95, weight_decay=0.5,
        clip_norm=3.0,
    )  # fmt: skip
    tx = make_optimizer(config, 10)
    params = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.ones(3)}
    state, m, v = tx.init(params), dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
    wanted = {name: np.asarray(x) for name, x in params.items()}
    rng = np.random.default_rng(0)
    for number, rate in enumerate((0.005, 0.01, 0.01), 1):
        grads = {name: rng.normal(scale=2, size=x.shape).astype("f") for name, x in params.items()}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in grads.values()))
        assert norm > 3
        for name, g in grads.items():
            g = g * 3 / norm
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            move = m[name] / (1 - 0.8**number) / (np.sqrt(v[name] / (1 - 0.95**number)) + 1e-8)
            decay = 0.5 * wanted[name] if name == "kernel" else 0.0
            wanted[name] = wanted[name] - rate * (move + decay)
            np.testing.assert_allclose(params[name], wanted[name], rtol=1e-5, err_msg=name)


def test_adafactor_keeps_rows_and_columns_in_place_of_a_matrix():
    params = {"kernel": jnp.ones((256, 128))}
    sizes = {}
    for optimizer in ("adafactor", "adamw"):
        state = make_optimizer(OptimConfig(optimizer=optimizer), 10).init(params)
        sizes[optimizer] = sum(x.size for x in jax.tree.leaves(state))
    assert sizes["adamw"] > 2 * 256 * 128
    assert sizes["adafactor"] < 1.1 * (256 + 128) + 10


def test_wsd_warms_up_stays_and_falls_in_a_line():
    config = OptimConfig(lr=2.0, schedule="wsd", warmup_steps=4, decay_steps=10, final_lr_ratio=0.1)
    rates = np.array([float(make_schedule(config, 40)(i)) for i in range(41)])
    np.testing.assert_allclose(rates[:5], [0.5, 1, 1.5, 2, 2])
    np.testing.assert_allclose(rates[4:31], 2.0)
    np.testing.assert_allclose(rates[30:], np.linspace(2.0, 0.2, 11), rtol=1e-6)
    tenth = OptimConfig(lr=2.0, schedule="wsd", warmup_steps=0, final_lr_ratio=0.0)
    rates = [float(make_schedule(tenth, 40)(i)) for i in (35, 36, 38, 40)]
    np.testing.assert_allclose(rates, [2, 2, 1, 0])


def closed_form(schedule, step, *, peak, warmup, num_steps, floor):
    if step < warmup:
        return peak * (step + 1) / warmup
    length, at = num_steps - warmup, min(step, num_steps) - warmup
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        return peak * (floor + (1 - floor) * (1 + np.cos(np.pi * at / length)) / 2)
    decay = num_steps // 10
    return peak * (1 - (1 - floor) * max(at - (length - decay), 0) / decay)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_every_schedule_is_its_closed_form_and_keeps_its_last_rate(schedule, warmup):
    config = OptimConfig(lr=0.3, schedule=schedule, warmup_steps=warmup, final_lr_ratio=0.2)
    rate = make_schedule(config, 40)
    rates = np.array([float(rate(jnp.asarray(step))) for step in range(60)])
    settings = {"peak": 0.3, "warmup": warmup, "num_steps": 40, "floor": 0.2}
    wanted = [closed_form(schedule, step, **settings) for step in range(60)]
    np.testing.assert_allclose(rates, wanted, rtol=1e-5)
    assert rates.min() > 0  # no step is for nothing
    np.testing.assert_allclose(rates[40:], 0.3 if schedule == "constant" else 0.06, rtol=1e-5)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_gradient_over_the_limit_moves_as_one_at_it(clip_norm):
    config = OptimConfig(
        optimizer="sgd", lr=0.01, warmup_steps=0, schedule="constant", weight_decay=0.0,
        clip_norm=clip_norm,
    )  # fmt: skip
    tx = make_optimizer(config, 10)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(1)}
    unit = {"kernel": jnp.full((2, 2), 0.4), "bias": jnp.full(1, 0.6)}  # of norm 1 in all
    moves = []
    for norm in (0.5, 1.0, 10.0):
        grads = jax.tree.map(lambda x, norm=norm: norm * x, unit)
        moves.append(tx.update(grads, tx.init(params), params)[0]["kernel"])
    np.testing.assert_allclose(moves[0] / moves[1], 0.5, rtol=1e-5)
    np.testing.assert_allclose(moves[2] / moves[1], 1.0 if clip_norm else 10.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"b1": 1.0}, "b1 and b2"),
        ({"accumulate_steps": 0}, "accumulate_steps must be at least 1"),
        ({"final_lr_ratio": 2.0}, "final_lr_ratio must be in 0..1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**options)
