"""Array aliases, the shape alphabet, and run-time shape checks that tests switch on.

Shape letters used in every annotation of the project:

    b  batch                      k  keyframes (or clips) per video
    f  frames per clip            h w c  height, width, channels
    n  deep tokens per keyframe   z  deep-token width
    t  sequence position          s  keys / cache slots
    d  model width                m  mixture components
    v  vocabulary                 l  context tokens

As a *variable*, `t` or `timesteps` is diffusion time.
"""

import os
from collections.abc import Callable
from typing import TypeVar, cast

from jax import Array
from jaxtyping import Bool, Float, Int, Key, PRNGKeyArray, PyTree, UInt8, jaxtyped

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Int",
    "Key",
    "PRNGKeyArray",
    "PyTree",
    "UInt8",
    "typechecked",
]

_Function = TypeVar("_Function", bound=Callable)

CHECK_SHAPES = os.environ.get("DICODE_CHECK_SHAPES", "0") == "1"


def typechecked(function: _Function) -> _Function:
    """Checks annotated shapes and dtypes at every call when `DICODE_CHECK_SHAPES=1`.

    The tests set it. Elsewhere the function is returned untouched, so there is no cost and
    `beartype` is not needed.
    """
    if not CHECK_SHAPES:
        return function
    from beartype import beartype

    return cast(_Function, jaxtyped(function, typechecker=beartype))
