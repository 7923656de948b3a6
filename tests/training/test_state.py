"""The step: accumulation, steps that are not finite, and the moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dicode_jax.training.stage import WEIGHT
from dicode_jax.training.state import create_state, make_train_step


class Model(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.array([0.5, -1.0, 2.0]))


def loss_fn(model, batch, keys):
    error = batch["x"] @ model.weight[...] - batch["y"]
    return jnp.mean(jnp.square(error)), {"largest": jnp.max(jnp.abs(error))}


def make(tx, **options):
    graph, params = nnx.split(Model())
    use_ema = options.get("ema_decay", 0) > 0
    state = create_state(params, tx, jax.random.key(0), use_ema=use_ema)
    options.setdefault("loss_fn", loss_fn)
    step = make_train_step(graph, tx=tx, schedule=optax.linear_schedule(0, 1, 100), **options)
    return state, jax.jit(step)


def make_batch(seed, rows=6):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    return {"x": x, "y": rng.normal(size=rows).astype(np.float32)}


def weight(state):
    return np.asarray(state.params["weight"][...])


def test_step_is_gradient_descent_on_the_loss():
    state, step = make(optax.sgd(0.1))
    batch = make_batch(0, rows=5)  # which no number of parts divides
    before = weight(state)
    state, metrics = step(state, {}, batch)
    error = batch["x"] @ before - batch["y"]
    gradient = 2 * batch["x"].T @ error / 5
    np.testing.assert_allclose(weight(state), before - 0.1 * gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    assert (int(state.step), int(state.skipped), float(metrics["finite"])) == (1, 0, 1.0)


def test_accumulated_parts_give_the_gradient_of_the_whole_batch():
    batch = make_batch(1)
    whole, whole_metrics = (step := make(optax.adam(0.1)))[1](step[0], {}, batch)
    parts, parts_metrics = (step := make(optax.adam(0.1), accumulate_steps=3))[1](
        step[0], {}, batch
    )
    np.testing.assert_allclose(weight(parts), weight(whole), rtol=1e-5)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(parts_metrics[name], whole_metrics[name], rtol=1e-5)


def test_every_row_has_a_key_of_its_own_in_whatever_part_it_is():
    def spread(model, batch, keys):
        noise = jax.vmap(jax.random.uniform)(keys) * batch["x"][:, 0]
        return 0.0 * model.weight[...].sum(), {"noise": noise.mean(), "first": batch["x"][0, 0]}

    batch = make_batch(2, rows=4)
    for parts in (1, 2, 4):
        state, step = make(optax.sgd(0.1), accumulate_steps=parts, loss_fn=spread)
        for number in range(2):  # and in every step
            key = jax.random.fold_in(jax.random.key(0), number)
            noise = [float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(4)]
            state, metrics = step(state, {}, batch)
            wanted = np.mean(noise * batch["x"][:, 0])
            np.testing.assert_allclose(metrics["noise"], wanted, rtol=1e-6)
            np.testing.assert_allclose(metrics["first"], batch["x"][:parts, 0].mean(), rtol=1e-6)


def test_accumulated_parts_count_by_the_weight_that_the_loss_tells():
    """Rows of lengths 1, 4, 1, 4: what is a mean over all numbers stays one in any parts."""

    def loss_of_valid(model, batch, keys):
        error = jnp.square(batch["x"] - model.weight[...])
        valid = jnp.arange(3) < batch["length"][:, None]
        loss = jnp.where(valid, error, 0).sum() / valid.sum()
        return loss, {"loss_again": loss, WEIGHT: valid.sum()}

    batch = {"x": make_batch(6, rows=8)["x"], "length": np.array([1, 3, 1, 3, 1, 3, 1, 3])}
    valid = np.arange(3) < batch["length"][:, None]
    wanted = (np.square(batch["x"] - weight(make(optax.sgd(0.1))[0])) * valid).sum() / valid.sum()
    found = {}
    for parts in (1, 2, 4):
        state, step = make(optax.sgd(0.1), loss_fn=loss_of_valid, accumulate_steps=parts)
        state, metrics = step(state, {}, batch)
        assert WEIGHT not in metrics
        np.testing.assert_allclose([metrics["loss"], metrics["loss_again"]], wanted, rtol=1e-6)
        found[parts] = weight(state)
    np.testing.assert_allclose(found[2], found[1], rtol=1e-6)
    np.testing.assert_allclose(found[4], found[1], rtol=1e-6)


def test_step_that_is_not_finite_changes_nothing_but_the_counters():
    state, step = make(optax.adam(0.1), ema_decay=0.9)
    state, _ = step(state, {}, make_batch(3))
    bad = make_batch(4)
    bad["x"][2, 1] = np.inf
    after, metrics = step(state, {}, bad)
    assert float(metrics["finite"]) == 0.0
    assert (int(after.step), int(after.skipped)) == (2, 1)
    kept = [(s.params, s.opt_state, s.ema) for s in (state, after)]
    jax.tree.map(np.testing.assert_array_equal, *kept)

    after, metrics = step(after, {}, make_batch(5))  # and goes on
    assert float(metrics["finite"]) == 1.0
    assert np.isfinite(weight(after)).all()
    assert np.abs(weight(after) - weight(state)).max() > 0
    np.testing.assert_allclose(metrics["lr"], 0.01, rtol=1e-5)  # of the second update, not third


def test_average_follows_with_a_decay_that_ramps_up():
    state, step = make(optax.sgd(0.1), ema_decay=0.9)
    average = weight(state)
    for i in range(3):
        state, _ = step(state, {}, make_batch(i))
        decay = min(0.9, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * weight(state)
    np.testing.assert_allclose(state.ema["weight"][...], average, rtol=1e-5)
