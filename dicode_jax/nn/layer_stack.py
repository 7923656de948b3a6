"""A stack of equal blocks: one module per block in a loop, or stacked parameters under `lax.scan`.

The scan keeps the program small for deep models; on CPU the loop runs faster. Both hold the same
weights and compute the same thing, with and without a cache of keys and values.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.nn.kv_cache import KVCache
from dicode_jax.nn.remat import Remat, checkpoint
from dicode_jax.nn.rngs import blank
from dicode_jax.runtime.sharding import BATCH, constrain
from dicode_jax.typing import Array

_Model = TypeVar("_Model", bound=nnx.Module)


def make_blocks(
    make: Callable[..., nnx.Module], cfg: Any, *, rngs: nnx.Rngs, **options
) -> nnx.Module:
    """`cfg.num_layers` blocks, each `make(cfg, rngs=rngs, **options)`.

    They form an `nnx.List`, or with `cfg.scan_layers` one module whose parameters have a leading
    axis.
    """

    def block(rngs):
        return make(cfg, rngs=rngs, **options)

    if cfg.scan_layers:
        return nnx.vmap(block, in_axes=0, out_axes=0)(rngs.split(cfg.num_layers))
    return nnx.List([block(rngs) for _ in range(cfg.num_layers)])


def run_blocks(
    blocks: nnx.Module,
    call: Callable[[nnx.Module, Any, Any, Any], tuple[Any, Any]],
    x: Any,
    *,
    cache: KVCache | None = None,
    keys: Array | None = None,
    remat: Remat = False,
) -> tuple[Any, KVCache | None]:
    """Sends `x` through the blocks of `make_blocks`.

    Args:
      call: `(block, x, past, key)` to `(x, past)`; `past` is the block's `(k, v)` slots or None.
      x: What goes into the first block: an array `[b, ...]`, or a pytree of such.
      cache: Past keys and values, of the same form (stacked or not) as the blocks.
      keys: One random key per block, or None.
      remat: What of each block the backward pass computes again, see `nn.remat.checkpoint`.

    Returns:
      The output of the last block, and the cache with its new contents (its `length` is left to
      the caller), None without one.
    """
    if isinstance(blocks, nnx.List):
        pasts = []
        for i, block in enumerate(blocks):
            past = None if cache is None else (cache.k[i], cache.v[i])
            key = None if keys is None else keys[i]
            x, past = _call(call, block, _by_batch(x), past, key, remat)
            pasts.append(past)
        if cache is None:
            return x, None
        k, v = zip(*pasts, strict=True)
        return x, dataclasses.replace(cache, k=k, v=v)

    graph, state = nnx.split(blocks)

    # The compiler would rather split x as it finds the weights split, and keep the whole batch.
    def body(x, layer):
        state, past, key = layer
        x, past = call(nnx.merge(graph, state), _by_batch(x), past, key)
        return _by_batch(x), past

    body = checkpoint(body, remat, prevent_cse=False)
    past = None if cache is None else (cache.k, cache.v)
    x, past = jax.lax.scan(body, x, (state, past, keys))
    return x, None if cache is None else dataclasses.replace(cache, k=past[0], v=past[1])


def _by_batch(x: Any) -> Any:
    return jax.tree.map(lambda leaf: constrain(leaf, BATCH), x)


def _call(call, block, x, past, key, remat):
    if remat in (False, "none"):
        return call(block, x, past, key)
    graph, state = nnx.split(block)

    def run(state, x, past, key):
        return call(nnx.merge(graph, state), x, past, key)

    return checkpoint(run, remat)(state, x, past, key)


def without_scan(config: Any) -> Any:
    """The config of a model, or of one with such a `body`, with one module per block."""
    if hasattr(config, "body"):
        return dataclasses.replace(config, body=without_scan(config.body))
    is_stacked = getattr(config, "scan_layers", False)
    return dataclasses.replace(config, scan_layers=False) if is_stacked else config


def unstack(path: tuple, array: Any) -> list[tuple[tuple, Any]]:
    """Paths and arrays of single blocks for an array of stacked ones; of others the array itself.

    Generating with stacked blocks, a compiler copies the weights of each out of the stack for every
    token: GPT-2 large then moves three times as many bytes.
    """
    if "blocks" not in path:
        return [(path, array)]
    at = path.index("blocks") + 1
    return [((*path[:at], i, *path[at:]), x) for i, x in enumerate(array)]


def with_scan_layers(model: _Model, scan_layers: bool = True) -> _Model:
    """The same weights in the other storage: stacked blocks (`True`) or one module per block.

    Args:
      model: Has `cfg` with `num_layers` and `scan_layers`, `dtype`, and its stack as `blocks`.
    """
    made_with: Any = model
    if made_with.cfg.scan_layers == scan_layers:
        return model
    cfg = dataclasses.replace(made_with.cfg, scan_layers=scan_layers)
    graph, abstract = nnx.split(blank(type(model), cfg, dtype=made_with.dtype))
    leaves = dict(nnx.to_flat_state(nnx.state(model)))

    def find(path):
        if path[0] != "blocks":
            return leaves[path]
        if not scan_layers:
            return jax.tree.map(lambda x: x[path[1]], leaves["blocks", *path[2:]])
        layers = [leaves["blocks", i, *path[1:]] for i in range(cfg.num_layers)]
        is_on_host = isinstance(jax.tree.leaves(layers)[0], np.ndarray)
        stack = np.stack if is_on_host else jnp.stack
        return jax.tree.map(lambda *xs: stack(xs), *layers)

    flat = nnx.to_flat_state(abstract)
    return nnx.merge(graph, nnx.from_flat_state([(path, find(path)) for path, _ in flat]))
