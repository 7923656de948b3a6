"""What a training needs of a device's memory, told from shapes before anything is allocated."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.errors import UserError
from dicode_jax.runtime.memory import available as available
from dicode_jax.training.setup import Plan
from dicode_jax.training.stage import Stage
from dicode_jax.typing import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device.

    Attributes:
      held: Parameters, optimiser, average and frozen parameters.
      trained: The parameters that learn, and so one copy of their gradients.
    """

    held: int
    trained: int

    def step(self, rows: int, row: int, *, accumulates: bool) -> int:
        """While a step is computed: gradients, updates, sums of both when parts are added up.

        Args:
          rows: Of a part of the batch.
          row: Bytes of one, from `row_bytes`.
        """
        return self.held + (3 if accumulates else 2) * self.trained + rows * row


def measure(plan: Plan) -> Memory:
    """What a training holds on each device."""
    places = plan.shardings
    state = plan.state.replace(rng=jax.eval_shape(jax.random.key_data, plan.state.rng))
    return Memory(
        held=_per_device(state, places.state) + _per_device(plan.frozen, places.frozen),
        trained=_per_device(plan.state.params, places.state.params),
    )


def row_bytes(stage: Stage, plan: Plan) -> int:
    """What the backward pass keeps of one row; temporary arrays inside a layer are not counted."""

    def kept(b: int) -> int:
        batch = stage.batch_shapes(b)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), b))

        def backward(params, frozen, batch, keys):
            told = {"step": jnp.zeros((), jnp.int32)} if stage.takes_step else {}

            def loss(params):
                return stage.loss_fn(nnx.merge(plan.graph, params, frozen), batch, keys, **told)[0]

            return jax.vjp(loss, params)[1]

        with jax.set_mesh(plan.mesh):
            arrays = jax.eval_shape(backward, plan.state.params, plan.frozen, batch, keys)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))

    return max(kept(2) - kept(1), 1)


def parts_that_fit(memory: Memory, rows: int, row: int, free: int) -> int:
    """In how many equal parts a device works off its rows so that they fit, at most all."""
    for parts in range(1, rows + 1):
        need = memory.step(rows // parts, row, accumulates=parts > 1)
        if rows % parts == 0 and need <= free:
            return parts
    return rows


def require(memory: Memory, total: int) -> None:
    """Refuses a training that cannot fit whatever the batch.

    Raises:
      UserError: Parameters, optimiser and gradients are more than all memory of the device.
    """
    if (need := memory.held + memory.trained) > total:
        raise UserError(
            f"weights, optimiser and gradients need {need / 1e9:.1f} GB of each device, which has "
            f"{total / 1e9:.1f} GB: split them over more devices (--sharding.fsdp N), train fewer "
            "parts, keep less in the optimiser (--optim.optimizer adafactor), or take a smaller "
            "config"
        )


def _per_device(tree: PyTree, places: PyTree) -> int:
    sizes = jax.tree.map(
        lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize, tree, places
    )
    return sum(jax.tree.leaves(sizes))
