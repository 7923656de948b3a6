"""Parts too large to be on a device at once: their sizes, told in time, and where they lie.

All in memory, split over the devices of a mesh, or read from their folder for as long as they run.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax import config as config_lib
from dicode_jax.errors import UserError
from dicode_jax.nn.layer_stack import without_scan
from dicode_jax.nn.rngs import blank
from dicode_jax.runtime import memory, sharding
from dicode_jax.storage import weights


def part_bytes(folder: pathlib.Path, param_dtype: Any, skip: tuple[str, ...] = ()) -> int:
    """What the weights of a stored module take in memory; only their header is read.

    Args:
      skip: See `weights.load_module`.

    Raises:
      UserError: They are missing or damaged.
    """
    arrays, _ = weights.read_header(folder / weights.WEIGHTS_FILE)
    shapes = [shape for name, (_, shape) in arrays.items() if not name.startswith(skip)]
    return sum(map(math.prod, shapes)) * jnp.dtype(param_dtype).itemsize


def outline(folder: pathlib.Path, kind: Any, config_type: type, **types: Any) -> nnx.Module:
    """A stored module as `load_module` gives it, with shapes in place of arrays."""
    config = config_lib.from_json(config_type, folder / weights.CONFIG_FILE)
    return blank(kind, without_scan(config), **types)


def check_room(
    sizes: Mapping[str, int],
    devices: Sequence[Any],
    *,
    offload: bool,
    stages: Sequence[Sequence[str]] = (),
) -> None:
    """Refuses parts that devices cannot hold, before they are read.

    Args:
      sizes: Bytes of each part.
      devices: Over which they are split; the first one for what is loaded part by part.
      offload: Whether one stage is in memory at a time.
      stages: Parts that run together; a part that is in none runs alone.

    Raises:
      UserError: They need more than is free; it says how much of what.
    """
    devices = devices[:1] if offload else devices
    free = [room and room[0] for room in map(memory.available, devices)]
    groups = [[name for name in stage if name in sizes] for stage in (*stages, *zip(sizes))]
    takes = lambda group: sum(sizes[name] for name in group)  # noqa: E731
    largest = max(groups, key=takes)
    needed = takes(largest if offload else sizes)
    if None in free or needed <= sum(free):  # type: ignore[arg-type]
        return
    parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in sizes.items())
    where = f"{devices[0].platform.upper()} has {sum(free) / 1e9:.3g} GB free"  # type: ignore
    if offload:
        what = f"{' and '.join(largest)} {'alone takes' if len(largest) == 1 else 'together take'}"
        raise UserError(
            f"{what} {needed / 1e9:.3g} GB, and the {where}: load in a narrower type, as --dtype "
            "bfloat16, or take a larger device"
        )
    raise UserError(
        f"the parts take {needed / 1e9:.3g} GB ({parts}), and the {where}: with --offload they are "
        f"loaded one after another, which takes {takes(largest) / 1e9:.3g} GB; --dtype bfloat16 "
        "takes half of float32"
    )


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """Where parts are read anew each time they run.

    Attributes:
      load: Part by its name.
      sizes: Bytes of each part in memory.
    """

    load: Any
    sizes: Mapping[str, int]

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[tuple[Any, Any]]:
        """Graph and state of a part, which is freed behind the block."""
        graph, state = nnx.split(self.load(name))
        try:
            yield graph, state
        finally:
            for leaf in jax.tree.leaves(state):
                leaf.delete()


def spread(module: nnx.Module, devices: Sequence[Any], *, min_size: int = 2**16) -> nnx.Module:
    """The module with every large array split over the devices, and small ones on each.

    Args:
      module: Its arrays may be NumPy's.
      min_size: Numbers of the smallest array that is split.
    """
    cfg = sharding.ShardingConfig(data=1, fsdp=-1, min_size=min_size)
    mesh = sharding.make_mesh(cfg, devices)
    graph, state = nnx.split(module)
    return nnx.merge(graph, sharding.place(state, sharding.param_shardings(state, mesh, cfg)))
