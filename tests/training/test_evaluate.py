"""Validation is one number, however the held-out examples are put into batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded_training
from flax import nnx

from dicode_jax.data.stream import RecordExamples
from dicode_jax.nn.rngs import draw
from dicode_jax.stages.dicode import language_model
from dicode_jax.training.evaluate import Evaluation
from dicode_jax.training.stage import WEIGHT
from train import data


class Model(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.array([0.5, -1.0, 2.0]))


def loss_fn(model, batch, keys):
    """A mean over valid numbers, with noise, and a metric that is no mean over them."""
    x = batch["x"] + 0.1 * draw(jax.random.normal, keys, batch["x"].shape)
    valid = jnp.arange(3) < batch["length"][:, None]
    loss = jnp.where(valid, jnp.square(x - model.weight[...]), 0).sum() / valid.sum()
    return loss, {"std": jnp.std(x), WEIGHT: valid.sum()}


def in_batches(examples, size):
    """Batches of `size`; the last one goes on with the first examples, as streams do."""
    length = len(next(iter(examples.values())))
    places = np.arange(-(-length // size) * size).reshape(-1, size) % length
    return [{name: x[rows] for name, x in examples.items()} for rows in places]


@pytest.mark.slow
def test_mean_is_by_weight_and_the_same_in_batches_of_any_size():
    rng = np.random.default_rng(0)
    examples = {
        "x": rng.normal(size=(7, 3)).astype(np.float32),
        "length": np.array([1, 3, 1, 3, 2, 3, 1]),
    }
    found = {
        size: Evaluation(loss_fn, lambda size=size: in_batches(examples, size), 7)(Model())
        for size in (7, 4, 1, 8)
    }
    for size, metrics in found.items():
        assert metrics.keys() == {"validation_loss", "validation_std"}
        for name, value in metrics.items():
            np.testing.assert_allclose(value, found[7][name], rtol=1e-6, err_msg=f"{name} {size}")
    without_noise = np.square(examples["x"] - np.array([0.5, -1.0, 2.0]))
    valid = np.arange(3) < examples["length"][:, None]
    wanted = without_noise[valid].mean()
    np.testing.assert_allclose(found[7]["validation_loss"], wanted, rtol=0.1)  # noise of 0.1
    means = np.array([row[v].mean() for row, v in zip(without_noise, valid)])
    assert abs(means.mean() - wanted) > 0.15 * wanted  # a mean of means is another number


def test_rows_behind_the_last_example_count_nothing():
    rows = {"x": np.ones((4, 3), np.float32), "length": np.full(4, 3)}
    rows["x"][3] = np.nan
    metrics = Evaluation(loss_fn, lambda: [rows], 3)(Model())
    assert np.isfinite(metrics["validation_loss"])
    assert np.isnan(Evaluation(loss_fn, lambda: [rows])(Model())["validation_loss"])


@pytest.mark.slow
def test_language_model_has_one_validation_loss_in_batches_of_8_4_and_1():
    stage = sharded_training.with_random_weights(
        sharded_training.language_model_stage((1, 1, 1), batch_size=8)
    )
    graph, abstract = nnx.split(nnx.eval_shape(lambda: stage.create(nnx.Rngs(0))))
    arrays = stage.load()
    model = nnx.merge(
        graph,
        nnx.from_flat_state(
            [
                (path, v.replace(jnp.asarray(arrays[path])))
                for path, v in nnx.to_flat_state(abstract)
            ]
        ),
    )
    batch = sharded_training.make_batch(stage, 0)
    batch["frame_mask"] = np.arange(3) < np.array([1, 3, 2, 3, 1, 1, 3, 2])[:, None]
    loss = functools.partial(language_model.loss_fn, stage.config, deterministic=True)
    found = [
        Evaluation(loss, lambda size=size: in_batches(batch, size), 8)(model)["validation_loss"]
        for size in (8, 4, 1)
    ]
    np.testing.assert_allclose(found, found[0], rtol=1e-6)
    whole = nnx.jit(loss)(model, batch, jax.random.key(0))[0]
    np.testing.assert_allclose(found[0], whole, rtol=1e-6)


class Source:
    """Numbers as a data set."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def name(self, index):
        return str(index)

    def record(self, index):
        return index


def read(record, rng):
    x = record + rng.normal(size=3)  # as a clip is cut at random
    return {"x": x.astype(np.float32), "length": np.int32(1 + record % 3)}


@pytest.mark.parametrize("held_out", [5, 20])
def test_run_looks_at_the_same_examples_whatever_its_batch_size(held_out):
    examples = RecordExamples(Source(held_out), read)
    found = []
    for batch_size in (1, 3, 8):
        config = sharded_training.language_model_stage((1, 1, 1), batch_size=batch_size).config
        config = dataclasses.replace(config, validation_examples=6)
        found.append(data.evaluation(config, loss_fn, examples)(Model())["validation_loss"])
    np.testing.assert_allclose(found, found[0], rtol=1e-6)
