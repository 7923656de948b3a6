"""One mesh for one device or a thousand: how parameters and batches lie on it.

The mesh has three axes. `data` and `fsdp` split the batch; `fsdp` splits large parameters (and what
the optimiser keeps of them) too; `tensor` splits matrices inside a layer. Models know nothing of
it: rules over the paths of parameters say how each one lies, and the compiler adds the
communication.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dicode_jax.errors import UserError
from dicode_jax.typing import Array, PyTree

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that split a batch, as one entry of a PartitionSpec
ROWS, WHOLE = PartitionSpec(BATCH), PartitionSpec()  # split by its first axis; on every device


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """The mesh, and ordered rules for parameters.

    Attributes:
      data: Devices along the axis that only splits the batch.
      fsdp: Devices along the axis that splits the batch and large parameters.
      tensor: Devices along the axis that splits matrices; of one axis -1: all that are left.
      rules: `(regex, rule)` pairs over a parameter's dotted path, the first counts. A rule is
        `fsdp` (the largest axis that divides), `replicate`, or entries of the last axes:
        `-`, `data`, `fsdp`, `tensor`, or some joined by `+`, as in `-,fsdp+tensor`.
      min_size: Parameters with fewer numbers are replicated by `fsdp`.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: tuple[tuple[str, str], ...] = ((r".*", "fsdp"),)
    min_size: int = 2**16

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in AXES}
        if any(size < 1 and size != -1 for size in sizes.values()):
            raise ValueError(f"mesh axes must be positive, or -1 for what is left, got {sizes}")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"only one mesh axis can take what is left, got {sizes}")
        for pattern, rule in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"sharding rule {pattern!r} is no regex: {error}") from None
            _check_rule(pattern, rule)


def make_mesh(cfg: ShardingConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run, over all devices of all processes by default.

    Raises:
      UserError: The axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(len(devices) // rest, 1)
    if math.prod(sizes) != len(devices):
        asked = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes))
        raise UserError(
            f"the mesh {asked} does not fit {len(devices)} device(s); set --sharding.data, "
            "--sharding.fsdp and --sharding.tensor so that their product does (-1: what is left)"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over `data` and `fsdp`, for arrays of any rank."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def row_mesh(devices: Sequence[Any] | None = None) -> Mesh | None:
    """A mesh for rows that know nothing of each other; None where there is one device.

    Args:
      devices: All of this process by default, or the one that `jax.default_device` names.
    """
    if devices is None:
        devices = () if jax.config.values["jax_default_device"] else jax.local_devices()
    return make_mesh(ShardingConfig(), devices) if len(devices) > 1 else None


def by_rows(function: Callable, mesh: Mesh | None, in_specs: PyTree, out_specs: PyTree) -> Callable:
    """The function, on every device for its own rows alone: nothing passes between devices.

    Args:
      function: Of arrays and pytrees; under a `jit`.
      mesh: None gives the function as it is.
      in_specs: `ROWS`, `WHOLE` or another spec for each argument or part of one.
      out_specs: The same for what it returns.
    """
    if mesh is None:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def param_shardings(tree: PyTree, mesh: Mesh, cfg: ShardingConfig) -> PyTree:
    """Where each parameter lies: a tree of `NamedSharding` like `tree`.

    Args:
      tree: Arrays, or their shapes: an `nnx.State` or any other pytree.

    Raises:
      UserError: A rule does not fit the shape of a parameter it is found for.
    """

    def choose(key_path, x):
        path = dotted_path(key_path)
        for pattern, rule in cfg.rules:
            if re.search(pattern, path):
                return NamedSharding(mesh, _spec(path, x.shape, pattern, rule, mesh, cfg.min_size))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(choose, tree)


def like_params(tree: PyTree, params: PyTree, shardings: PyTree, mesh: Mesh) -> PyTree:
    """Shardings for what an optimiser keeps.

    An array whose path ends with that of a parameter of the same shape lies as the parameter does.
    Others (counters, the factored moments of Adafactor) are small and replicated.

    Args:
      tree: The optimiser's state, or its shapes.
      params: The parameters, or their shapes.
      shardings: Of the parameters, from `param_shardings`.
    """
    known = {}
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    for (key_path, x), sharding in zip(flat, jax.tree.leaves(shardings), strict=True):
        known[dotted_path(key_path), x.shape] = sharding

    def choose(key_path, x):
        parts = dotted_path(key_path).split(".")
        for start in range(len(parts)):
            found = known.get((".".join(parts[start:]), x.shape))
            if found is not None:
                return found
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(choose, tree)


def dotted_path(key_path: Sequence[Any]) -> str:
    """Path of a leaf as rules see it, such as `lm.body.blocks.attn.qkv.kernel`."""
    kinds = ("key", "name", "idx")  # of dictionaries, attributes and sequences
    names = [str(getattr(key, k)) for key in key_path for k in kinds if hasattr(key, k)]
    return ".".join(names).removesuffix(".value")  # a variable holds its array as `value`


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts arrays that every process has whole (numpy's or jax's) where they belong.

    Each device gets its own part only, so no device ever holds a large array whole.
    """

    def put(x, sharding):
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """One global array for each entry, from the rows that this process has read.

    Args:
      batch: Numeric arrays whose first axis runs over this process's rows (see `batch_share`).
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
        for name, rows in batch.items()
    }


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of a batch this process reads: share number `index` of `count` equal ones.

    Processes that hold the same rows (the `tensor` axis may run across processes) read the same
    share, so this is not always `(jax.process_index(), jax.process_count())`.

    Raises:
      UserError: The mesh gives a process rows that are not one equal run of the batch.
    """
    blocks = mesh.devices.reshape(-1, mesh.shape["tensor"])  # a row: devices of the same batch rows
    rows_of: dict[int, set[int]] = {}
    for row, devices in enumerate(blocks):
        for device in devices:
            rows_of.setdefault(device.process_index, set()).add(row)
    mine = rows_of[jax.process_index()]
    size, first = len(mine), min(mine)
    runs = {(min(rows), max(rows) - min(rows) + 1, len(rows)) for rows in rows_of.values()}
    if any(start % size or width != size or count != size for start, width, count in runs):
        raise UserError(
            f"the mesh {dict(mesh.shape)} splits the batch unevenly between processes; let the "
            "tensor axis divide the devices of a process, or be a multiple of them"
        )
    return first // size, len(blocks) // size


def check_batch_size(batch_size: int, mesh: Mesh, accumulate_steps: int = 1) -> None:
    """Refuses a batch that the mesh cannot split.

    Raises:
      UserError: The devices (times accumulation steps) do not divide the batch.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate_steps
    if batch_size % ways:
        steps = f" x {accumulate_steps} accumulation steps" if accumulate_steps > 1 else ""
        raise UserError(
            f"batch_size {batch_size} does not split over data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']}{steps}; take a multiple of {ways}"
        )


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """Tells the compiler how an activation lies, where its own guess would be a bad one.

    Does nothing without a mesh (`jax.set_mesh`), in `by_rows`, nor to an axis that the mesh cannot
    split (that of one row under `jax.vmap`), so models may call it anywhere.

    Args:
      axes: One entry for each leading axis of `x`: a mesh axis, several, or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    for size, axis in zip(x.shape, axes):
        names = (axis,) if isinstance(axis, str) else axis or ()
        if size % math.prod(mesh.shape[name] for name in names):
            return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def gather_to_host(tree: PyTree) -> PyTree:
    """Whole arrays as numpy, on every process; all processes must call it together.

    Array by array, so that a device never holds more than one of them whole.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def _check_rule(pattern: str, rule: str) -> None:
    if rule == "replicate":
        return
    axes = [axis for entry in rule.split(",") for axis in entry.split("+") if axis != "-"]
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown or len(set(axes)) != len(axes):
        fault = f"knows no axis {unknown[0]!r}" if unknown else "uses a mesh axis twice"
        raise ValueError(
            f"sharding rule {rule!r} for {pattern!r} {fault}; write fsdp, replicate, or entries "
            "such as -,fsdp,tensor"
        )


def _spec(path, shape, pattern, rule, mesh, min_size) -> PartitionSpec:
    if rule == "replicate":
        return PartitionSpec()
    if rule == "fsdp":
        return _largest_axis(shape, mesh.shape["fsdp"], min_size)
    entries = [tuple(axis for axis in entry.split("+") if axis != "-") for entry in rule.split(",")]
    if len(entries) > len(shape):
        raise UserError(
            f"sharding rule {rule!r} ({pattern!r}) has {len(entries)} entries, {path} has shape "
            f"{shape}"
        )
    entries = [()] * (len(shape) - len(entries)) + entries
    for size, axes in zip(shape, entries):
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            raise UserError(
                f"sharding rule {rule!r} ({pattern!r}) splits {path} {shape} over {ways} devices, "
                f"which does not divide {size}; put another rule for it before this one"
            )
    return PartitionSpec(*(axes or None for axes in entries))


def _largest_axis(shape: tuple[int, ...], ways: int, min_size: int) -> PartitionSpec:
    if ways == 1 or math.prod(shape) < min_size:
        return PartitionSpec()
    fitting = [i for i, size in enumerate(shape) if size % ways == 0 and size]
    if not fitting:
        return PartitionSpec()
    largest = max(fitting, key=lambda i: (shape[i], i))
    return PartitionSpec(*("fsdp" if i == largest else None for i in range(len(shape))))
