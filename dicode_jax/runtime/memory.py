"""Memory of a device: what is free, and what a program needs, told before it is compiled."""

import math
import pathlib
import re
from typing import Any

import jax
from jax.extend import core


def available(device: Any) -> tuple[int, int] | None:
    """Free and all memory of a device, in bytes; None where it is not known."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0), stats["bytes_limit"]
    try:
        lines = pathlib.Path("/proc/meminfo").read_text()
    except OSError:  # not Linux
        return None
    found = dict(re.findall(r"(\w+): +(\d+) kB", lines))
    free, total = (1024 * int(found[name]) for name in ("MemAvailable", "MemTotal"))
    for limit, used in _cgroup_limits():
        free, total = min(free, limit - used), min(total, limit)
    return free, total


def peak_bytes(program: core.Jaxpr) -> int:
    """Most bytes that values take at once where a program runs one operation after the other.

    Arguments and constants are not counted. A compiler that fuses needs less, and adds room to work
    in of its own.
    """
    last = {v: i for i, eqn in enumerate(program.eqns) for v in eqn.invars if _is_variable(v)}
    last |= {v: len(program.eqns) for v in program.outvars if _is_variable(v)}
    made: dict[Any, int] = {}
    peak = 0
    for i, eqn in enumerate(program.eqns):
        before = sum(made.values())
        made |= {v: _bytes(v) for v in eqn.outvars}
        inside = max((peak_bytes(inner) for inner in _programs(eqn.params)), default=0)
        peak = max(peak, sum(made.values()), before + inside)
        for v in {*eqn.outvars, *filter(_is_variable, eqn.invars)}:
            if last.get(v, i) <= i:
                made.pop(v, None)
    return peak


def _is_variable(value: Any) -> bool:
    return isinstance(value, core.Var)


def _bytes(value: Any) -> int:
    return math.prod(value.aval.shape) * getattr(value.aval.dtype, "itemsize", 4)


def _programs(params: dict[str, Any]) -> list[core.Jaxpr]:
    """Bodies of a loop, a branch or a call."""
    found = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(params.values()))]
    return [x for x in found if isinstance(x, core.Jaxpr)]


def _cgroup_limits() -> list[tuple[int, int]]:
    """Limit and use of the container that this runs in, if it has a limit (cgroup 2, then 1)."""
    root = pathlib.Path("/sys/fs/cgroup")
    names = (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    )
    found = []
    for limit, used in names:
        try:
            found.append((int((root / limit).read_text()), int((root / used).read_text())))
        except (OSError, ValueError):  # there is none, or it says `max`
            continue
    return found
