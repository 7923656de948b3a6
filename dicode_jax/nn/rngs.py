"""Keys for modules that are built under a trace."""

import jax
from flax import nnx


class ShapeRngs:
    """Stands in for `nnx.Rngs` while a module is built under `nnx.eval_shape`.

    Every stream gives the same key, so the numbers are no good for training. Counting, as
    `nnx.Rngs` does, costs time that grows with the square of the number of parameters when it is
    traced: minutes for the full-size UNet, where this takes seconds.
    """

    def __init__(self):
        self._key = jax.random.key(0)

    def __call__(self) -> jax.Array:
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
