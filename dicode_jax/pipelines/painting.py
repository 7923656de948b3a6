"""Many independent clips through one compiled program: in micro-batches, over devices, in order.

A row is a pytree of arrays without a batch axis: all that one clip is painted from, its seed too.
Rows are asked for as they are needed, so that what makes them may still be at work.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from dicode_jax.errors import UserError
from dicode_jax.pipelines import options
from dicode_jax.runtime import memory
from dicode_jax.runtime.sharding import ROWS, WHOLE, by_rows
from dicode_jax.typing import PyTree, UInt8

ON_CPU = 2  # clips at once, which took the least time on two cores; more wait longer for the first
MOST = 8  # beyond these a GPU has enough to do
USABLE = 0.7  # of the memory that is free: programs need room to work in

_T = TypeVar("_T")


class Clip(NamedTuple):
    """A clip of a stream.

    Attributes:
      sample: Number of the prompt or video that it is of.
      index: Its number in the video, from 0.
      frames: In [0, 255].
    """

    sample: int
    index: int
    frames: UInt8[np.ndarray, "f h w 3"]


def program(function: Callable[..., PyTree]) -> Any:
    """Compiles `function(*modules, rows, *shared, **static)` for one device or several.

    Each device computes its own rows, and nothing passes between them. The result is called as
    `(graphs, states, rows, shared, static=(), mesh=None)`, with rows stacked to a batch and
    `static` as pairs, and gives a pytree of rows.
    """

    def run(graphs, states, rows, shared, *, static=(), mesh=None):
        def each(states, rows, shared):
            return function(*map(nnx.merge, graphs, states), rows, *shared, **dict(static))

        return by_rows(each, mesh, (WHOLE, ROWS, WHOLE), ROWS)(states, rows, shared)

    run.__name__ = function.__name__  # which profiles and `dicode warmup` show
    return jax.jit(run, static_argnames=("graphs", "static", "mesh"))


def paint(
    run: Callable[[PyTree], PyTree],
    rows: Iterable[PyTree],
    size: int,
    place: NamedSharding | None = None,
) -> Iterator[PyTree]:
    """What a program makes of each row, as numpy arrays and in order.

    While the host copies the results of a micro-batch (and the caller does something with them),
    the device works on the next one. Rows of one micro-batch more are asked for before they are
    waited for, so that a device that also makes them has done so in time.

    Args:
      run: Takes a micro-batch on devices and returns without waiting.
      rows: Of arrays of numpy or jax.
      size: Rows of a micro-batch, which the last one is filled up to with its last row.
      place: How a micro-batch lies on devices.
    """

    def running():
        for batch in ahead(batched(rows, size), 1):
            out = run(stacked(batch, size, place))
            jax.tree.map(lambda x: x.copy_to_host_async(), out)
            yield len(batch), out

    for count, out in ahead(running(), 1):
        found = jax.tree.map(np.asarray, out)
        yield from (jax.tree.map(lambda x, i=i: x[i], found) for i in range(count))


def ahead(items: Iterable[_T], count: int) -> Iterator[_T]:
    """The items, `count` more of which are asked for before one is given."""
    waiting: collections.deque[_T] = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def check_clips(clips_per_batch: Any) -> int | None:
    """A number of clips, or None for "auto".

    Raises:
      UserError: It is neither.
    """
    if isinstance(clips_per_batch, str) and clips_per_batch == "auto":
        return None
    try:
        return options.Whole(1, options.MAX_CLIPS)(clips_per_batch)
    except ValueError as error:
        raise UserError(f'clips_per_batch: {error}; or "auto"') from None


def clips_that_fit(run: Any, row: PyTree, modules: tuple, device: Any, **shared: Any) -> int:
    """As many clips as a device paints at once in good time and has memory for.

    Args:
      run: Of `program`.
      row: One of them.
      modules: Graphs and states.
      device: Whose memory counts.
      shared: What the program takes besides.
    """
    if device.platform == "cpu":
        return ON_CPU
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), row)
    return _fitting(run.trace(*modules, shapes, **shared).jaxpr, device)


@functools.lru_cache(maxsize=64)  # another number would compile again, though less is free by then
def _fitting(traced: Any, device: Any) -> int:
    room = memory.available(device)
    if room is None:
        return 1
    fits = int(USABLE * room[0]) // max(memory.peak_bytes(traced.jaxpr), 1)
    return 2 ** (min(max(fits, 1), MOST).bit_length() - 1)


def stacked(rows: list[PyTree], size: int, place: NamedSharding | None = None) -> PyTree:
    """A micro-batch on devices, which the last of the rows fills up."""
    full = rows + rows[-1:] * (size - len(rows))
    whole = jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *full)
    return jax.device_put(whole, place)


def batched(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Runs of as many items, the last of which may be shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
