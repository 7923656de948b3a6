"""Functions of a model that training looks at between steps, compiled, on any mesh."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.nn.rngs import row_keys, stream
from dicode_jax.runtime.sharding import ShardingConfig, gather_to_host, global_batch, make_mesh
from dicode_jax.training.stage import STATISTICS, WEIGHT, LossFn
from dicode_jax.typing import Array, PyTree


def jit_model(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function(model, *arrays)`, which only reads the model.

    `nnx.jit` would hand all parameters back as well.
    """

    def call(graph: nnx.GraphDef, state: nnx.State, *arrays: PyTree):
        return function(nnx.merge(graph, state), *arrays)

    compiled = jax.jit(call, static_argnums=0)
    return lambda model, *arrays: compiled(*nnx.split(model), *arrays)


def look(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jit_model` for the model of a run: results are whole arrays in host memory.

    All processes must call it together, with the model that they share.
    """
    compiled = jit_model(function)
    return lambda model, *arrays: gather_to_host(compiled(model, *arrays))


def jit_local(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jit_model` for a model that this process has for itself; results are in host memory.

    It runs on the first device of the process, whatever mesh a run has set.
    """
    compiled = jit_model(function)

    def call(model: nnx.Module, *arrays: PyTree):
        with jax.set_mesh(make_mesh(ShardingConfig(), jax.local_devices()[:1])):
            return jax.device_get(compiled(model, *arrays))

    return call


class Evaluation:
    """Mean of a loss and its metrics over the first examples of held-out data.

    Each row goes through the loss alone (under `jax.vmap`) with a key of its own, and rows are put
    together by their `WEIGHT`: the mean depends neither on the batch size nor on the devices.

    Args:
      loss_fn: See `training.stage.LossFn`.
      read: Gives this process's rows of the batches; called once, at the first evaluation.
      count: How many examples are looked at; rows behind them fill the last batch and count
        nothing. None takes all.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        read: Callable[[], Sequence[Mapping[str, np.ndarray]]],
        count: int | None = None,
    ):
        self._sums = jit_model(functools.partial(_weighted_sums, loss_fn))
        self._read, self._batches = read, None
        self._count = np.iinfo(np.int32).max if count is None else count

    def __call__(self, model: nnx.Module) -> dict[str, float]:
        """`validation_loss`, and `validation_NAME` for each metric of the loss.

        Call it under `jax.set_mesh`; without a mesh the batches stay on the default device.
        """
        if self._batches is None:
            self._batches = list(self._read())
        mesh = jax.sharding.get_mesh()
        first, found = 0, []
        for batch in self._batches:
            arrays = dict(batch) if mesh.empty else global_batch(batch, mesh)
            found.append(self._sums(model, arrays, first, self._count))
            first += len(jax.tree.leaves(arrays)[0])
        found = jax.device_get(found)
        sums = {name: np.sum([batch[name] for batch in found], dtype=float) for name in found[0]}
        weight = sums.pop(WEIGHT)
        return {f"validation_{name}": float(total / weight) for name, total in sums.items()}


def _weighted_sums(
    loss_fn: LossFn, model: nnx.Module, batch: Mapping[str, Array], first: Array, count: Array
) -> dict[str, Array]:
    """Sums over rows of loss and metrics times their weight, and of the weights."""

    def row(batch, key):
        loss, metrics = loss_fn(model, jax.tree.map(lambda x: x[None], batch), key[None])
        metrics = {name: x for name, x in metrics.items() if name != STATISTICS}
        return {WEIGHT: jnp.ones(()), "loss": loss, **metrics}

    num_rows = len(jax.tree.leaves(batch)[0])
    of_rows = jax.vmap(row)(batch, row_keys(stream(0, "validation"), num_rows, first))
    weight = of_rows.pop(WEIGHT)
    counts = (first + jnp.arange(num_rows) < count) & (weight > 0)
    sums = {name: jnp.where(counts, weight * x, 0).sum() for name, x in of_rows.items()}
    return sums | {WEIGHT: jnp.where(counts, weight, 0).sum()}
