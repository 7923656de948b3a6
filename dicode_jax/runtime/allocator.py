"""Memory that a training on CPUs keeps from step to step.

A program on a CPU takes its temporaries from the C library in every call and gives them back
behind it. glibc maps large blocks anew each time, and the kernel clears each page of four kilobytes
when it is first touched: a quarter of the time of a step of the small models.
"""

import ctypes
import importlib.util
import os
import platform

__all__ = ["keep"]

# Of malloc.h, in this order: one arena, which grows by `sbrk`; large blocks are not mapped; what is
# free at its end stays, up to the most that can be said; it grows by half a gigabyte.
_OPTIONS = ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 2**29))
_OWN = ("GLIBC_TUNABLES", "LD_PRELOAD")
_ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def keep() -> bool:
    """Has glibc keep what it was given back, in this process and until its end.

    Call it before jax starts its devices, whose threads else have arenas of their own already. A
    host with accelerators is left alone, as are another C library and a user's own settings
    (`MALLOC_...`, `GLIBC_TUNABLES`, `LD_PRELOAD`). Memory in use does not change; what was the
    most stays with the process.

    Returns:
      Whether it does.
    """
    is_set = any(name.startswith("MALLOC_") or name in _OWN for name in os.environ)
    if is_set or not _computes_here() or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return sum(mallopt(name, value) for name, value in _OPTIONS) == len(_OPTIONS)  # 1 each


def _computes_here() -> bool:
    if wanted := os.environ.get("JAX_PLATFORMS"):
        return wanted == "cpu"
    return not any(importlib.util.find_spec(name) for name in _ACCELERATORS)
