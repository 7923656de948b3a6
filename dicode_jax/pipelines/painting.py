"""Many independent clips through the same programs: in micro-batches, over devices, in order.

A row is a pytree of arrays without a batch axis: all that one clip is painted from, its seed too.
Rows are asked for as they are needed, so that what makes them may still be at work.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from dicode_jax.diffusion.watching import Taken, Watch
from dicode_jax.errors import UserError
from dicode_jax.pipelines import options
from dicode_jax.runtime import kept_programs, memory
from dicode_jax.runtime.sharding import ROWS, WHOLE, by_rows
from dicode_jax.typing import Array, PyTree, UInt8

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


@dataclasses.dataclass(frozen=True)
class Flat:
    """Graphs, and the structure of their states, which are a tuple of arrays beside it.

    To look through the states of large modules takes Python milliseconds in every call.
    """

    graphs: tuple
    tree: Any

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.graphs, self.tree))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def of(cls, graphs: tuple, states: tuple) -> tuple["Flat", tuple]:
        """What `program`s take as graphs and states."""
        leaves, tree = jax.tree.flatten(states)
        return cls(graphs, tree), tuple(leaves)


def program(function: Callable[..., PyTree]) -> Any:
    """Compiles `function(*modules, rows, *shared, **static)` for one device or several.

    Each device computes its own rows, and nothing passes between them. The result is called as
    `(graphs, states, rows, shared, static=(), mesh=None)`, with rows stacked to a batch and
    `static` as pairs, and gives a pytree of rows.
    """

    def run(graphs, states, rows, shared, *, static=(), mesh=None):
        if isinstance(graphs, Flat):
            graphs, states = graphs.graphs, jax.tree.unflatten(graphs.tree, states)

        def each(states, rows, shared):
            return function(*map(nnx.merge, graphs, states), rows, *shared, **dict(static))

        return by_rows(each, mesh, (WHOLE, ROWS, WHOLE), ROWS)(states, rows, shared)

    # Which profiles and `dicode warmup` show, and what kept programs are known by.
    run.__name__, run.__module__ = function.__name__, function.__module__
    run.__qualname__ = function.__qualname__
    return kept_programs.jit(run, static_argnames=("graphs", "static", "mesh"))


class Programs(NamedTuple):
    """A sampling as three programs of `program`, so that its steps can be taken some at a time.

    Another number of steps at a time compiles nothing, and other settings of sampling compile no
    other `finish`.

    Attributes:
      begin: `(*modules, rows, sampling, *shared, **static)` to what all steps are given, and a
        `Carry`: pytrees of rows.
      advance: `(*modules, rows, sampling, start, stop, **static)`, of rows `{"given": .., "carry":
        ..}`, to the next carry and a tick, `ticks(rows, stop)`.
      finish: `(*modules, latents)` to what is painted.
    """

    begin: Any
    advance: Any
    finish: Any

    def run(
        self,
        modules: tuple[Any, tuple],
        batch: PyTree,
        settings: tuple,
        timesteps: Sequence[Any] | np.ndarray,
        watch: Watch,
        clips: int,
        **options: Any,
    ) -> Generator[Any, None, None]:
        """Dispatches a micro-batch: gives `Taken`s, if anybody listens, and then what is painted.

        Args:
          modules: Graphs and states.
          batch: Rows.
          settings: Sampling, and what `begin` takes besides.
          timesteps: One for each step.
          watch: Who listens.
          clips: Rows that count.
          options: `static` and `mesh`.
        """
        modules = Flat.of(*modules)
        given, carry = self.begin(*modules, batch, shared=settings, **options)

        def advance(carry, start, stop):
            rows = {"given": given, "carry": carry}
            shared = settings[0], start, stop
            return self.advance(*modules, rows, shared=shared, **options)

        carry = yield from watch.run(advance, carry, timesteps, clips)
        yield self.finish(*modules, carry.state.x, shared=(), mesh=options.get("mesh"))

    def traced(self, modules: tuple[Any, tuple], rows: PyTree, shared: tuple, static: tuple = ()):
        """All three as `jax.jit` traces them."""
        modules = Flat.of(*modules)
        begin = self.begin.trace(*modules, rows, shared=shared, static=static)
        given, carry = begin.out_info
        rows, shared = {"given": given, "carry": carry}, (shared[0], np.int32(0), np.int32(1))
        advance = self.advance.trace(*modules, rows, shared=shared, static=static)
        return begin, advance, self.finish.trace(*modules, carry.state.x, shared=())


def ticks(rows: PyTree, stop: Any) -> Array:
    """What a call gives beside its result, by which the host sees that it is done; `[b]`."""
    return jnp.full(jax.tree.leaves(rows)[0].shape[:1], stop, jnp.int32)


@program
def latents(*modules_and_latents):
    """The `finish` of programs whose latents are asked for; and which of them are finite."""
    *_, x = modules_and_latents
    return x, jnp.isfinite(x).all(axis=(1, 2, 3, 4))


def paint(
    run: Callable[[PyTree, int], Iterable[Any]],
    rows: Iterable[PyTree],
    size: int,
    place: NamedSharding | None = None,
    watch: Watch | None = None,
    waiting: int = 1,
) -> Iterator[PyTree]:
    """What a program makes of each row, as numpy arrays and in order.

    While the host copies the results of a micro-batch (and the caller does something with them),
    the device works on the next one. Rows of one micro-batch more are asked for before they are
    waited for, so that a device that also makes them has done so in time.

    Args:
      run: Takes a micro-batch on devices, and how many of its rows count. It dispatches calls, and
        gives the last one's result, behind a `Taken` for each of the others.
      rows: Of arrays of numpy or jax.
      size: Rows of a micro-batch, which the last one is filled up to with its last row.
      place: How a micro-batch lies on devices.
      watch: Is told of what is taken.
      waiting: Calls that are dispatched before one is waited for.
    """

    def running():
        for batch in ahead(batched(rows, size), 1):
            for made in run(stacked(batch, size, place), len(batch)):
                if not isinstance(made, Taken):
                    jax.tree.map(lambda x: x.copy_to_host_async(), made)
                yield len(batch), made

    for count, made in ahead(running(), waiting):
        if isinstance(made, Taken):
            assert watch is not None
            watch.tell(made)
            continue
        found = jax.tree.map(np.asarray, made)
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
      run: Of `program`, or `Programs`.
      row: One of them.
      modules: Graphs and states.
      device: Whose memory counts.
      shared: What the program takes besides.
    """
    if device.platform == "cpu":
        return ON_CPU
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), row)
    if isinstance(run, Programs):
        traced = run.traced(modules, shapes, **shared)
    else:
        traced = (run.trace(*modules, shapes, **shared),)
    return _fitting(tuple(one.jaxpr for one in traced), device)


@functools.lru_cache(maxsize=64)  # another number would compile again, though less is free by then
def _fitting(traced: tuple, device: Any) -> int:
    room = memory.available(device)
    if room is None:
        return 1
    # What goes from program to program is little beside what the greatest of them needs.
    fits = int(USABLE * room[0]) // max(1, *(memory.peak_bytes(one.jaxpr) for one in traced))
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


def gathered(clips: Iterator[np.ndarray], count: int) -> np.ndarray:
    """Arrays of one shape, `[count, ...]`; no second copy is made."""
    first = next(clips)
    whole = np.empty((count, *first.shape), first.dtype)
    whole[0] = first
    for i, clip in enumerate(clips, 1):
        whole[i] = clip
    return whole


def whole_videos(clips: Iterable[Clip]) -> np.ndarray:
    """Whole videos of clips, `[b, f, h, w, 3]`."""
    samples: dict[int, list[np.ndarray]] = {}
    for clip in clips:
        samples.setdefault(clip.sample, []).append(clip.frames)
    return np.stack([np.concatenate(parts) for parts in samples.values()])
