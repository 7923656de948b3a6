"""Keys and values of a language model's past: a plain pytree of static shape.

It goes in as an argument and comes out as a result, so it works under `jit` and as the carry of
`lax.scan`. Two forms: a tuple with one array per layer (fastest in a Python loop over layers), or
one array with a leading layer axis (for models that scan over their layers).
"""

import dataclasses

import jax
import jax.core
import jax.numpy as jnp

from dicode_jax.typing import Array, Float

Layers = tuple[Float[Array, "b s h d"], ...] | Float[Array, "layers b s h d"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Past keys and values; slots at `length` and beyond are empty (zeros) and must be masked.

    Attributes:
      k: Keys of each layer.
      v: Values of each layer.
      length: Slots in use, an int32 scalar: all rows of a batch advance together.
    """

    k: Layers
    v: Layers
    length: Array

    @classmethod
    def empty(
        cls,
        *,
        num_layers: int,
        batch: int,
        size: int,
        num_heads: int,
        head_dim: int,
        dtype=jnp.float32,
        stacked: bool = False,
    ) -> "KVCache":
        """A cache of `size` slots with nothing in it; `stacked` puts layers on a leading axis."""
        shape = (batch, size, num_heads, head_dim)
        if stacked:
            k = jnp.zeros((num_layers, *shape), dtype)
            v = jnp.zeros((num_layers, *shape), dtype)
        else:
            k = tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))
            v = tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))
        return cls(k=k, v=v, length=jnp.zeros((), jnp.int32))

    @property
    def size(self) -> int:
        """Number of slots."""
        return self.k[0].shape[-3]

    def check_room(self, count: int) -> None:
        """Refuses to write past the end, where that can be known (not under `jit`).

        Raises:
          ValueError: `count` more slots do not fit.
        """
        if count > self.size:
            raise ValueError(
                f"{count} new positions do not fit in a cache of {self.size} slots; make it larger"
            )
        if not isinstance(self.length, jax.core.Tracer) and int(self.length) + count > self.size:
            raise ValueError(
                f"the cache has {self.size} slots and {int(self.length)} are used; "
                f"{count} more do not fit, make it larger"
            )


def write(
    slots: Float[Array, "b s h d"], new: Float[Array, "b t h d"], length: Array | int
) -> Array:
    """Puts `new` into the slots from `length` on."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), length, axis=1)
