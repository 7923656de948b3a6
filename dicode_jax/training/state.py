"""The state of a run and the pure step that advances it."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx

from dicode_jax.nn.rngs import row_keys
from dicode_jax.runtime.sharding import BATCH, constrain
from dicode_jax.training.stage import STATISTICS, WEIGHT, LossFn, Metrics
from dicode_jax.typing import Array, PyTree

# (state, frozen, batch) -> (state, metrics)
TrainStep = Callable[["TrainState", PyTree, PyTree], tuple["TrainState", Metrics]]

NO_ROW = 2**32 - 1  # the number of the key of a step that no row has


class TrainState(flax.struct.PyTreeNode):
    """Everything that a run needs to go on exactly where it stopped.

    Attributes:
      step: Number of steps done, int32 scalar.
      params: NNX state of the trained parameters.
      opt_state: Optax state.
      ema: Moving average of `params`, or None.
      rng: Typed PRNG key of the run; the key of a step is `fold_in(rng, step)`, and that of a row
        of its batch the same with the row's number folded in.
      skipped: How many of the steps changed nothing because loss or gradients were not finite,
        int32 scalar.
    """

    step: Any
    params: PyTree
    opt_state: PyTree
    ema: PyTree
    rng: Any
    skipped: Any


def create_state(
    params: PyTree, tx: optax.GradientTransformation, rng: Array, *, use_ema: bool
) -> TrainState:
    """The state of a run before its first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params) if use_ema else None,
        rng=rng,
        skipped=jnp.zeros((), jnp.int32),
    )


def make_train_step(
    graph: nnx.GraphDef,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    ema_decay: float = 0.0,
    accumulate_steps: int = 1,
    shardings: PyTree = None,
    takes_step: bool = False,
    update: Callable[[PyTree, PyTree, Array], PyTree] | None = None,
) -> TrainStep:
    """One training step as a pure function; the caller compiles it (and donates the state).

    A step whose loss or gradients are not finite leaves parameters, optimiser and average as they
    were, bit for bit; it counts in `step` and in `skipped`.

    Args:
      graph: Graph definition of the model, split into `(trained, frozen)`.
      loss_fn: See `training.stage.LossFn`.
      ema_decay: Decay of the moving average; it ramps up as (1 + step) / (10 + step). 0 keeps none.
      accumulate_steps: Parts that a batch is worked off in, one after the other; part `i` has every
        `accumulate_steps`-th row from row `i` on. Gradients, loss and metrics are means over the
        parts by their `WEIGHT`, and so those of the whole batch.
      shardings: Of the parameters, which the gradients take too; None leaves it to the compiler.
      takes_step: See `Stage`.
      update: Moves parameters behind the optimiser, see `Stage.update`.

    Returns:
      `step(state, frozen, batch) -> (state, metrics)`; metrics hold `loss`, `grad_norm`, `lr`,
      `finite` (1.0 or 0.0) and what the loss reports.
    """

    def loss_of(params, frozen, batch, keys, step):
        told = {"step": step} if takes_step else {}
        loss, metrics = loss_fn(nnx.merge(graph, params, frozen), batch, keys, **told)
        weight = jnp.asarray(metrics.get(WEIGHT, len(keys)), jnp.float32)
        statistics = metrics.get(STATISTICS)
        metrics = {k: x for k, x in metrics.items() if k not in (WEIGHT, STATISTICS)}
        return loss, (metrics, weight, statistics)

    def grad_fn(*args):
        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(*args)
        metrics, weight, statistics = aux
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings)
        return ((loss, metrics, grads), weight), statistics

    def gradients(params, frozen, batch, keys, step):
        if accumulate_steps == 1:
            (means, _), statistics = grad_fn(params, frozen, batch, keys, step)
            return means, statistics

        def add_part(total, part):
            (means, weight), statistics = grad_fn(params, frozen, *part, step)
            sums = jax.tree.map(lambda x: weight * x, means)
            return jax.tree.map(jnp.add, total, (sums, weight)), statistics

        parts = jax.tree.map(lambda x: _split_rows(x, accumulate_steps), (batch, keys))
        first = jax.tree.map(lambda x: x[0], parts)
        shapes, _ = jax.eval_shape(grad_fn, params, frozen, *first, step)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        (sums, weight), statistics = jax.lax.scan(add_part, zeros, parts)
        means = jax.tree.map(lambda x: x / jnp.where(weight > 0, weight, 1), sums)
        return means, jax.tree.map(_join_rows, statistics)

    def train_step(state: TrainState, frozen: PyTree, batch: PyTree):
        (num_rows,) = {len(x) for x in jax.tree.leaves(batch)}
        key = jax.random.fold_in(state.rng, state.step)
        keys = constrain(row_keys(key, num_rows), BATCH)
        taken = state.step - state.skipped  # the optimiser counts its own steps
        (loss, metrics, grads), statistics = gradients(state.params, frozen, batch, keys, taken)
        grad_norm = optax.global_norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if update is not None:
            params = update(params, statistics, jax.random.fold_in(key, NO_ROW))
        ema = state.ema
        if ema is not None:
            decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = optax.incremental_update(params, ema, 1.0 - decay)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, ema),
            (state.params, state.opt_state, state.ema),
        )
        metrics = {
            "loss": loss,
            **metrics,
            "grad_norm": grad_norm,
            "lr": schedule(taken),
            "finite": finite.astype(jnp.float32),
        }
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=ema,
            skipped=state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32),
        )
        return state, metrics

    return train_step


def _split_rows(x: Array, parts: int) -> Array:
    """`[b, ...]` to `[parts, b/parts, ...]` in strides, so that rows stay on their devices."""
    return constrain(rearrange(x, "(b parts) ... -> parts b ...", parts=parts), None, BATCH)


def _join_rows(x: Array) -> Array:
    """What `_split_rows` split, in the order of the rows."""
    return rearrange(x, "parts b ... -> (b parts) ...")
