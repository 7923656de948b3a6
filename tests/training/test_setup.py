"""From a stage to a state: what is drawn, what is loaded, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.errors import UserError
from dicode_jax.nn.rngs import row_keys
from dicode_jax.runtime.sharding import ShardingConfig, global_batch, make_mesh
from dicode_jax.training.optim import OptimConfig
from dicode_jax.training.setup import prepare
from dicode_jax.training.stage import Stage

LOADED = ("frozen", "kernel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    optim: OptimConfig = OptimConfig(lr=0.1, warmup_steps=0)
    sharding: ShardingConfig = ShardingConfig()
    num_steps: int = 10
    batch_size: int = 4
    ema_decay: float = 0.0
    seed: int = 11


class Model(nnx.Module):
    def __init__(self, rngs):
        self.frozen = nnx.Linear(3, 5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(5, 5, rngs=rngs) for _ in range(11)])
        self.stack = nnx.vmap(lambda rngs: nnx.Linear(5, 2, rngs=rngs))(rngs.split(4))

    def __call__(self, x):
        x = self.frozen(x)
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def make_stage(load=dict, is_trained=lambda path, _: path[0] != "frozen", **settings):
    return Stage(
        name="test",
        config=Config(**settings),
        create=Model,
        load=load,
        is_trained=is_trained,
        loss_fn=lambda model, batch, key: (jnp.mean(jnp.square(model(batch["x"]))), {}),
        batch_shapes=lambda b: {"x": jax.ShapeDtypeStruct((b, 3), jnp.float32)},
        export=lambda model, folder: None,
    )


def one_device():
    return make_mesh(ShardingConfig(), jax.devices()[:1])


def flat(module):
    return {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(module))}


def test_fresh_parameters_are_those_of_the_seed():
    prepared = prepare(make_stage(), one_device())
    got, wanted = flat(prepared.model_of(prepared.state)), flat(Model(nnx.Rngs(11)))
    assert got.keys() == wanted.keys()
    for path in wanted:
        np.testing.assert_allclose(got[path], wanted[path], rtol=1e-6, err_msg=str(path))


def test_steps_draw_from_another_stream_than_the_parameters():
    """Else the noise of step i is the numbers that parameter i was made of."""
    stage = make_stage()
    prepared = prepare(stage, one_device())
    keys = [jax.random.fold_in(prepared.state.rng, i) for i in range(40)]
    keys += [*row_keys(keys[0], 40), prepared.state.rng]
    noise = [np.asarray(jax.random.normal(key, (5, 5))).ravel() for key in keys]
    for layer in prepared.model_of(prepared.state).layers:
        kernel = np.asarray(layer.kernel[...]).ravel()
        found = [abs(np.corrcoef(kernel, x)[0, 1]) for x in noise]
        assert max(found) < 0.9  # 25 numbers by chance: about 0.6; of one key: 0.98


def test_loaded_arrays_take_their_places_and_outlive_the_donated_state():
    kernel = np.arange(15, dtype=np.float64).reshape(3, 5) / 10
    bias = np.linspace(-1, 1, 5, dtype=np.float32)
    loaded = {LOADED: kernel, ("layers", 10, "bias"): bias}
    prepared = prepare(make_stage(lambda: loaded), one_device())
    got = flat(prepared.model_of(prepared.state))
    np.testing.assert_array_equal(got[LOADED], kernel.astype(np.float32))
    np.testing.assert_array_equal(got["layers", 10, "bias"], bias)
    np.testing.assert_allclose(
        got["layers", 9, "kernel"], flat(Model(nnx.Rngs(11)))["layers", 9, "kernel"], rtol=1e-6
    )

    state, metrics = prepared.train_step(prepared.state, {"x": np.ones((4, 3), np.float32)})
    after = flat(prepared.model_of(state))
    np.testing.assert_array_equal(after[LOADED], got[LOADED])  # not trained
    assert np.abs(after["layers", 10, "bias"] - bias).max() > 0
    np.testing.assert_array_equal(loaded["layers", 10, "bias"], np.linspace(-1, 1, 5, dtype="f"))
    assert np.isfinite(float(metrics["loss"]))


def test_average_is_what_model_of_gives_unless_told_otherwise():
    prepared = prepare(make_stage(ema_decay=0.04), one_device())  # less than the first of the ramp
    state, _ = prepared.train_step(prepared.state, {"x": np.ones((4, 3), np.float32)})
    average, latest = (flat(prepared.model_of(state, use_ema=e)) for e in (True, False))
    path = ("layers", 0, "bias")
    np.testing.assert_allclose(average[path], 0.96 * latest[path], rtol=1e-5)  # bias starts at 0
    assert np.abs(latest[path]).max() > 0


def test_a_step_moves_nothing_between_host_and_device_once_its_batch_is_placed():
    prepared = prepare(make_stage(ema_decay=0.9), one_device())
    batch = {"x": np.ones((4, 3), np.float32)}
    placed, state = global_batch(batch, prepared.mesh), prepared.state
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            state, metrics = prepared.train_step(state, placed)
        with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
            prepared.train_step(state, batch)  # what the guard is for: an array of the host
    assert int(state.step) == 2
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({("gone", "kernel"): np.zeros(2)}, r"no place in the model, such as gone\.kernel"),
        ({LOADED: np.zeros((5, 3))}, r"frozen\.kernel is \(5, 3\) in the loaded weights, \(3, 5\)"),
    ],
)
def test_loaded_arrays_that_do_not_fit_are_refused(arrays, fault):
    with pytest.raises(UserError, match=fault):
        prepare(make_stage(lambda: arrays), one_device())


def test_config_that_trains_nothing_is_refused():
    with pytest.raises(UserError, match="no parameter to train"):
        prepare(make_stage(is_trained=lambda path, _: False), one_device())


def test_batch_that_does_not_split_is_refused_before_anything_is_drawn():
    with pytest.raises(UserError, match="take a multiple of 3"):
        prepare(make_stage(optim=OptimConfig(accumulate_steps=3)), one_device())
