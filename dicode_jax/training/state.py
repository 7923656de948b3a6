"""The state of a run and the pure, donated step that advances it."""

import functools
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dicode_jax.typing import Array, PyTree

Metrics = Mapping[str, Array]
# (model, batch, key) -> (loss, metrics)
LossFn = Callable[[nnx.Module, PyTree, Array], tuple[Array, Metrics]]


@flax.struct.dataclass
class TrainState:
    """Everything that a run needs to go on exactly where it stopped.

    Attributes:
      step: Number of steps done, int32 scalar.
      params: NNX state of the trained parameters.
      opt_state: Optax state.
      ema: Moving average of `params`, or None.
      rng: Typed PRNG key of the run; the key of a step is `fold_in(rng, step)`.
    """

    step: Array
    params: PyTree
    opt_state: PyTree
    ema: PyTree
    rng: Array


def create_state(
    params: PyTree, tx: optax.GradientTransformation, rng: Array, *, use_ema: bool
) -> TrainState:
    """The state of a run before its first step."""
    ema = jax.tree.map(jnp.copy, params) if use_ema else None
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), ema=ema, rng=rng
    )


def make_train_step(
    graph: nnx.GraphDef,
    frozen: PyTree,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]:
    """Compiles one training step; the state is donated.

    Args:
      graph: Graph definition of the model, split into `(trained, frozen)`.
      frozen: State of the parameters that are not trained.
      loss_fn: `(model, batch, key) -> (loss, metrics)`.
      ema_decay: Decay of the moving average; it ramps up as (1 + step) / (10 + step). 0 keeps none.

    Returns:
      `step(state, batch) -> (state, metrics)`; metrics hold `loss`, `grad_norm`, `lr` and what the
      loss reports.
    """

    def loss_of(params, frozen, batch, rng):
        return loss_fn(nnx.merge(graph, params, frozen), batch, rng)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, frozen: PyTree, batch: PyTree):
        rng = jax.random.fold_in(state.rng, state.step)
        grad_fn = jax.value_and_grad(loss_of, has_aux=True)
        (loss, metrics), grads = grad_fn(state.params, frozen, batch, rng)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = optax.incremental_update(params, ema, 1.0 - decay)
        metrics = {
            "loss": loss,
            **metrics,
            "grad_norm": optax.global_norm(grads),
            "lr": schedule(state.step),
        }
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        return state, metrics

    return lambda state, batch: train_step(state, frozen, batch)
