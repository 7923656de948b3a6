"""Keys for modules of which only the shapes matter."""

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
