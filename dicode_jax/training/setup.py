"""From a stage to a run's state and compiled step, on whatever mesh there is.

Shapes come first (`plan_stage`); nothing is allocated until it is known where each array lies. Then
fresh parameters are drawn and loaded ones are read straight into their places (`prepare`), so that
no device ever holds a large model whole.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dicode_jax.errors import UserError
from dicode_jax.nn.rngs import TracedRngs, blank, stream
from dicode_jax.runtime import sharding
from dicode_jax.training.optim import make_schedule
from dicode_jax.training.stage import Metrics, Stage
from dicode_jax.training.state import TrainState, TrainStep, create_state, make_train_step
from dicode_jax.typing import Array, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shardings:
    """Where everything lies: trees of `NamedSharding`, one for each argument of the step.

    Attributes:
      state: Like the `TrainState`.
      frozen: Like the frozen parameters.
      batch: One for all arrays of a batch.
    """

    state: TrainState
    frozen: PyTree
    batch: NamedSharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A training on a mesh, before any number exists.

    Attributes:
      mesh: The devices.
      graph: Graph definition of the model, split into `(trained, frozen)`.
      state: Shapes and types of the `TrainState`.
      frozen: Shapes and types of the parameters that are not trained.
      shardings: Where they lie.
      create: `params -> TrainState` before the first step, pure.
      step: `(state, frozen, batch) -> (state, metrics)`, compiled at its first call; the state is
        donated. Call it under `jax.set_mesh(mesh)`.
    """

    mesh: Mesh
    graph: nnx.GraphDef
    state: TrainState
    frozen: PyTree
    shardings: Shardings
    create: Callable[[PyTree], TrainState]
    step: TrainStep

    def lower(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> jax.stages.Lowered:
        """The step for a batch of these shapes, ready to be compiled without any array."""
        place = functools.partial(
            jax.tree.map, lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        )
        batch = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.shardings.batch)
            for name, x in batch.items()
        }
        with jax.set_mesh(self.mesh):
            return self.step.lower(
                place(self.state, self.shardings.state),
                place(self.frozen, self.shardings.frozen),
                batch,
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A training that can start, or be restored into.

    Attributes:
      plan: What it was made from.
      state: Before the first step. `train_step` donates it.
      frozen: Parameters that are not trained.
    """

    plan: Plan
    state: TrainState
    frozen: PyTree

    @property
    def graph(self) -> nnx.GraphDef:
        """Graph definition of the model, split into `(trained, frozen)`."""
        return self.plan.graph

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.plan.mesh

    @property
    def shardings(self) -> Shardings:
        """Where everything lies."""
        return self.plan.shardings

    def train_step(
        self, state: TrainState, batch: Mapping[str, Array]
    ) -> tuple[TrainState, Metrics]:
        """One step on a global batch (`sharding.global_batch`); `state` is used up."""
        with jax.set_mesh(self.mesh):
            return self.plan.step(state, self.frozen, batch)

    def model_of(self, state: TrainState, *, use_ema: bool = True) -> nnx.Module:
        """The model with the averaged parameters if there are such, else with the latest."""
        params = state.ema if use_ema and state.ema is not None else state.params
        return nnx.merge(self.graph, params, self.frozen)


def plan_stage(stage: Stage, mesh: Mesh) -> Plan:
    """Shapes, places and the step of a stage.

    Raises:
      UserError: A sharding rule does not fit, the mesh cannot split the batch, or nothing is
        trained.
    """
    config = stage.config
    sharding.check_batch_size(config.batch_size, mesh, config.optim.accumulate_steps)
    model = blank(stage.create)
    graph, params, frozen = nnx.split(model, stage.is_trained, ...)
    if not jax.tree.leaves(params):
        raise UserError(f"{stage.name}: the config leaves no parameter to train")

    tx = stage.make_optimizer(config.optim, config.num_steps)

    def create(params):
        # Not the stream that parameters are drawn from: the noise of a step must know none of them.
        rng = stream(config.seed, "training")
        return create_state(params, tx, rng, use_ema=config.ema_decay > 0)

    state = jax.eval_shape(create, params)

    whole = sharding.replicated(mesh)
    of_params = sharding.param_shardings(params, mesh, config.sharding)
    shardings = Shardings(
        state=TrainState(
            step=whole,
            params=of_params,
            opt_state=sharding.like_params(state.opt_state, params, of_params, mesh),
            ema=None if state.ema is None else of_params,
            rng=whole,
            skipped=whole,
        ),
        frozen=sharding.param_shardings(frozen, mesh, config.sharding),
        batch=sharding.batch_sharding(mesh),
    )
    step = make_train_step(
        graph,
        stage.loss_fn,
        tx,
        make_schedule(config.optim, config.num_steps),
        ema_decay=config.ema_decay,
        accumulate_steps=config.optim.accumulate_steps,
        shardings=of_params,
        takes_step=stage.takes_step,
        update=stage.update,
    )
    step = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings.state, shardings.frozen, shardings.batch),
        out_shardings=(shardings.state, whole),
    )
    return Plan(
        mesh=mesh,
        graph=graph,
        state=state,
        frozen=frozen,
        shardings=shardings,
        create=create,
        step=step,
    )


def prepare(stage: Stage, mesh: Mesh) -> Prepared:
    """Draws or loads all parameters of a stage and makes its state.

    The numbers do not depend on the mesh.

    Raises:
      UserError: As `plan_stage`; or what is loaded does not fit the model.
    """
    plan = plan_stage(stage, mesh)
    params, frozen = _fill(stage, plan)
    # Donated: parameters go into the state instead of being copied.
    create = jax.jit(plan.create, donate_argnums=0, out_shardings=plan.shardings.state)
    return Prepared(plan=plan, state=create(params), frozen=frozen)


def create_model(stage: Stage, mesh: Mesh) -> nnx.Module:
    """The model of a stage before its first step, as `prepare` makes it, without an optimiser.

    Raises:
      UserError: As `prepare`.
    """
    plan = plan_stage(stage, mesh)
    return nnx.merge(plan.graph, *_fill(stage, plan))


def _fill(stage: Stage, plan: Plan) -> tuple:
    """The states `(trained, frozen)` with numbers: loaded where there are such, else fresh."""
    abstract = (plan.state.params, plan.frozen)
    shardings = (plan.shardings.state.params, plan.shardings.frozen)
    shapes = _arrays(abstract[0]) + _arrays(abstract[1])
    places = jax.tree.leaves(shardings)
    loaded = dict(stage.load())
    _check_loaded(stage.name, loaded, dict(shapes))
    fresh = [path not in loaded for path, _ in shapes]

    def draw():
        model = stage.create(TracedRngs(stage.config.seed))
        _, *states = nnx.split(model, stage.is_trained, ...)
        return [x for x, wanted in zip(jax.tree.leaves(states), fresh, strict=True) if wanted]

    drawn = iter(())
    if any(fresh):
        out = [place for place, wanted in zip(places, fresh, strict=True) if wanted]
        drawn = iter(jax.jit(draw, out_shardings=out)())
    leaves = [
        next(drawn)
        if wanted
        else sharding.place(_cast(loaded.pop(path), x.dtype), place)  # popped: read, then freed
        for (path, x), place, wanted in zip(shapes, places, fresh, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _arrays(state: nnx.State) -> list[tuple[tuple, Any]]:
    """`(path of the variable, array)`, in the order of `jax.tree.leaves`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    is_name = jax.tree_util.DictKey  # the variable itself adds another kind of key
    return [(tuple(k.key for k in path if isinstance(k, is_name)), x) for path, x in flat]


def _cast(x: np.ndarray | Array, dtype) -> np.ndarray | Array:
    return x if x.dtype == dtype else x.astype(dtype)


def _check_loaded(name: str, loaded: Mapping, known: Mapping) -> None:
    unknown = [path for path in loaded if path not in known]
    if unknown:
        raise UserError(
            f"{name}: {len(unknown)} loaded array(s) have no place in the model, such as "
            f"{'.'.join(map(str, unknown[0]))}; the folder holds another model than the config"
        )
    for path, x in loaded.items():
        if tuple(x.shape) != tuple(known[path].shape):
            raise UserError(
                f"{name}: {'.'.join(map(str, path))} is {tuple(x.shape)} in the loaded weights, "
                f"{tuple(known[path].shape)} in the config's model"
            )
