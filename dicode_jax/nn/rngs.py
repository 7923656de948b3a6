"""Random keys: for modules that are built under a trace, by named streams, and row by row.

A draw for a batch may take one key for all of it, or keys `[b]`, one for each row. What a row draws
then depends on nothing but its own key: not on the rows beside it, nor on the parts and devices
that a batch is split over.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from flax import nnx

from dicode_jax.errors import UserError
from dicode_jax.typing import Array

MAX_ARRAYS = 20_000  # of a module that is built without them; each takes some milliseconds
_Module = TypeVar("_Module", bound=nnx.Module)


def sample_keys(seeds: Sequence[int] | Array) -> Array:
    """One key for each sample, of its own seed (0 to 2**32 - 1) alone."""
    # Folded once more for the sake of the videos that a seed has always given.
    first = lambda seed: jax.random.fold_in(jax.random.key(seed), 0)  # noqa: E731
    return jax.vmap(first)(jax.numpy.asarray(seeds, np.uint32))


def fold(keys: Array, number: int | Array) -> Array:
    """Folds a number, or one for each, into the keys."""
    return jax.vmap(jax.random.fold_in, (0, 0 if jax.numpy.ndim(number) else None))(keys, number)


class ShapeRngs:
    """Stands in for `nnx.Rngs` while a module is built under `jax.eval_shape`.

    Every stream gives the same key, so the numbers are no good for training. Counting, as
    `nnx.Rngs` does, costs time that grows with the square of the number of parameters when it is
    traced: minutes for the full-size UNet, where this takes seconds.

    Args:
      most: Keys that are given; whoever asks for more gets a UserError.
    """

    def __init__(self, most: int = MAX_ARRAYS):
        self._key, self._most, self._given = jax.random.key(0), most, 0

    def __call__(self) -> jax.Array:
        self._given += 1
        if self._given > self._most:
            raise UserError(f"the config asks for more than {self._most} arrays")
        return self._key

    def __getattr__(self, stream: str) -> "ShapeRngs":
        if stream.startswith("_"):
            raise AttributeError(stream)
        return self

    def split(self, count: int) -> nnx.Rngs:
        """Streams for `count` copies of a module that `nnx.vmap` builds."""
        return nnx.Rngs(0).split(count)


class TracedRngs:
    """Gives the keys of `nnx.Rngs(seed)`, for building a large module inside `jax.jit`.

    It counts in Python, so tracing takes time in proportion to the number of parameters (see
    `ShapeRngs`). Make it inside the traced function.
    """

    def __init__(self, seed: int):
        self._key, self._count = jax.random.key(seed), 0

    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self._key, self._count)
        self._count += 1
        return key

    def __getattr__(self, stream: str) -> "TracedRngs":
        if stream.startswith("_"):
            raise AttributeError(stream)
        return self

    def split(self, count: int) -> nnx.Rngs:
        """Streams for `count` copies of a module that `nnx.vmap` builds."""
        return nnx.Rngs(default=jax.random.split(self(), count))


def blank(
    kind: Callable[..., _Module], *sizes: Any, most: int = MAX_ARRAYS, **options: Any
) -> _Module:
    """The module `kind(*sizes, **options)` with shapes in place of arrays; no memory is touched.

    Raises:
      UserError: It has more than `most` arrays that are drawn.
    """
    graphs = []

    def make():
        rngs = cast(nnx.Rngs, ShapeRngs(most))
        graph, state = nnx.split(kind(*sizes, **options, rngs=rngs))
        graphs.append(graph)
        return state

    state = jax.eval_shape(make)  # a fifth sooner than nnx's own, which keeps track of changes
    return nnx.merge(graphs[0], state)


def stream(seed: int, name: str) -> Array:
    """The key of a named stream: of no other name, and of no parameter of `nnx.Rngs(seed)`."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def row_keys(key: Array, num_rows: int, first: int | Array = 0) -> Array:
    """Keys `[num_rows]`, that of row `i` being `fold_in(key, first + i)`; keys of rows stay."""
    if key.ndim:
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jax.numpy.arange(num_rows))


def split(key: Array, count: int) -> Array:
    """`count` keys of one key, or `[count, b]` of the keys of `b` rows."""
    if not key.ndim:
        return jax.random.split(key, count)
    return jax.vmap(lambda k: jax.random.split(k, count), out_axes=1)(key)


def next_key(rngs: nnx.RngStream) -> Array:
    """What a stream gives next; keys of all rows of `nnx.Rngs(dropout=keys)`."""
    if not rngs.key[...].ndim:
        return rngs()
    keys = jax.vmap(jax.random.fold_in)(rngs.key[...], rngs.count[...])
    rngs.count[...] += 1
    return keys


def draw(
    sample: Callable[[Array, tuple[int, ...]], Array], key: Array, shape: tuple[int, ...]
) -> Array:
    """`sample(key, shape)`, or row by row for keys `[b]`.

    Args:
      sample: Such as `jax.random.normal`.
      key: One, or those of rows.
      shape: Its first axis runs over rows; or over rows and, inside them, frames or places.
    """
    if not key.ndim:
        return sample(key, shape)
    (b,) = key.shape
    return jax.vmap(lambda k: sample(k, (shape[0] // b, *shape[1:])))(key).reshape(shape)
