"""What one training trains: a model, which of it learns, its loss, and how it is written out."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from dicode_jax.training.optim import OptimConfig, make_optimizer
from dicode_jax.typing import Array, PyTree

Path = tuple[Any, ...]  # of a variable in a module, as `nnx.to_flat_state` gives it
Metrics = Mapping[str, Array]

# `(model, batch, keys) -> (loss, metrics)`, all scalars; pure. `keys [b]` are one for each row, so
# that what a row draws depends on nothing else. Loss and metrics are means over something: over the
# rows, or over as much as the metric `WEIGHT` says (say, valid tokens). Means of parts of a batch
# are put together by it, and it is not logged.
LossFn = Callable[[Any, PyTree, Array], tuple[Array, Metrics]]
WEIGHT = "weight"

# What a loss hands on to `Stage.update` by this name, beside its metrics: arrays with the rows of
# the batch in front.
STATISTICS = "statistics"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A training without its data and its loop: pure parts that any device mesh can serve.

    Attributes:
      name: For the progress bar.
      config: The resolved config; has `optim`, `num_steps`, `batch_size`, `ema_decay`, `seed` and
        `sharding`.
      create: Builds the model fresh of `rngs`, also under `jax.eval_shape` and `jax.jit`.
      load: Reads what does not start fresh (frozen parts, weights that are gone on from): arrays by
        path of the variable. Empty when everything is fresh.
      is_trained: Filter on `(path, variable)`: whether the optimiser steps it.
      loss_fn: See `LossFn`.
      takes_step: Whether `loss_fn` is also given `step`, how many steps the optimiser has taken;
        where it is not given, as in validation, the loss is that of no step in particular.
      make_optimizer: Of the optimiser's config and the number of steps; see `training.optim`.
      batch_shapes: Shapes and types of a batch of the given size, without `ids`.
      export: Writes the model as folders that the pipelines and other trainings read.
      update: `(trained parameters, statistics, key) -> trained parameters` moves what no gradient
        does, such as codes, behind each step of the optimiser; pure. `statistics` are those of all
        rows (`STATISTICS`), the same however the batch was split.
    """

    name: str
    config: Any
    create: Callable[..., nnx.Module]
    load: Callable[[], Mapping[Path, np.ndarray | Array]]
    is_trained: Callable[[Path, Any], bool]
    loss_fn: LossFn
    batch_shapes: Callable[[int], dict[str, jax.ShapeDtypeStruct]]
    export: Callable[[Any, pathlib.Path], None]
    takes_step: bool = False
    make_optimizer: Callable[[OptimConfig, int], optax.GradientTransformation] = make_optimizer
    update: Callable[[Any, PyTree, Array], Any] | None = None
