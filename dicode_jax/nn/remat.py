"""Rematerialisation by name: what the backward pass finds stored and what it computes again."""

from collections.abc import Callable
from typing import Literal

import jax

# True and False are `full` and `none`.
Remat = bool | Literal["none", "full", "dots", "dots_no_batch"]

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def checkpoint(
    function: Callable,
    remat: Remat,
    *,
    prevent_cse: bool = True,
    transform: Callable = jax.checkpoint,
) -> Callable:
    """`function` with only some of its intermediate results stored for the backward pass.

    Args:
      function: Pure, on pytrees of arrays (or, with `nnx.remat` as `transform`, on modules).
      remat: `none` stores all results, `full` none, `dots` those of matrix products, and
        `dots_no_batch` those of matrix products without a batch axis: of linear layers, not of
        attention.
      prevent_cse: False inside `lax.scan`, where nothing needs to be kept from being merged.
      transform: `jax.checkpoint` or `nnx.remat`.

    Raises:
      ValueError: No policy has that name.
    """
    name = ("full" if remat else "none") if isinstance(remat, bool) else remat
    if name == "none":
        return function
    if name not in _POLICIES:
        raise ValueError(f"unknown remat {remat!r}; known are none, {', '.join(_POLICIES)}")
    return transform(function, policy=_POLICIES[name], prevent_cse=prevent_cse)
