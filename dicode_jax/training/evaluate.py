"""Functions of a model that training looks at between steps, compiled, on any mesh."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from dicode_jax.sharding import ShardingConfig, gather_to_host, global_batch, make_mesh
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
    """Mean of a loss and its metrics over fixed batches, each with a fixed key.

    Args:
      loss_fn: `(model, batch, key) -> (loss, metrics)`.
      read: Gives this process's rows of the batches; called once, at the first evaluation.
    """

    def __init__(
        self,
        loss_fn: Callable[[nnx.Module, PyTree, Array], tuple[Array, Mapping[str, Array]]],
        read: Callable[[], Sequence[Mapping[str, np.ndarray]]],
    ):
        self._loss, self._read, self._batches = jit_model(loss_fn), read, None

    def __call__(self, model: nnx.Module) -> dict[str, float]:
        """`validation_loss`, and `validation_NAME` for each metric of the loss.

        Call it under `jax.set_mesh`; without a mesh the batches stay on the default device.
        """
        if self._batches is None:
            self._batches = list(self._read())
        mesh = jax.sharding.get_mesh()
        totals: dict[str, list[float]] = {}
        for i, batch in enumerate(self._batches):
            arrays = dict(batch) if mesh.empty else global_batch(batch, mesh)
            loss, metrics = self._loss(model, arrays, jax.random.key(i))
            for name, value in {"loss": loss, **metrics}.items():
                totals.setdefault(f"validation_{name}", []).append(value)
        return {name: float(np.mean(jax.device_get(values))) for name, values in totals.items()}
