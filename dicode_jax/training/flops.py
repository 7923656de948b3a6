"""How much arithmetic a program does, and how much a device could do: for model FLOPs utilisation.

FLOPs are counted in the program as it was written (its jaxpr), before any compiler: multiplications
and additions of matrix products and convolutions. What is left out (norms, softmax, activations,
the optimiser) is a few percent of a transformer. Recomputation for the backward pass is told apart,
since utilisation counts only what the model needs.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

# Dense bfloat16 matrix products per second of one JAX device, from the makers' data sheets, by a
# pattern of its `device_kind`; the first that is found counts. Devices without bfloat16 units
# (V100, T4) are listed with float16. A JAX device is half a chip for TPU v2 and v3.
_PEAKS = (
    (r"GB200", 2.5e15),
    (r"B200", 2.25e15),
    (r"H200|GH200", 989e12),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100", 989e12),
    (r"A100|A800", 312e12),
    (r"L40S", 362e12),
    (r"L40", 181e12),
    (r"L4\b", 121e12),
    (r"A10G", 70e12),
    (r"A10\b", 125e12),
    (r"V100", 125e12),
    (r"T4\b", 65e12),
    (r"TPU v6", 918e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v4 lite", 137e12),
    (r"TPU v4", 275e12),
    (r"TPU v3", 61.5e12),
    (r"TPU v2", 22.5e12),
)


def peak_flops(device: Any) -> float | None:
    """Dense bfloat16 FLOPs per second of a `jax.Device` or a `device_kind`; None when unknown."""
    kind = device if isinstance(device, str) else device.device_kind
    found = (peak for pattern, peak in _PEAKS if re.search(pattern, kind, re.IGNORECASE))
    return next(found, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopCount:
    """Multiplications and additions of a program, over all devices.

    Attributes:
      model: What the result needs.
      recomputed: What `jax.checkpoint` does a second time in the backward pass.
    """

    model: int = 0
    recomputed: int = 0

    @property
    def total(self) -> int:
        """What the devices compute."""
        return self.model + self.recomputed

    def __add__(self, other: "FlopCount") -> "FlopCount":
        return FlopCount(
            model=self.model + other.model, recomputed=self.recomputed + other.recomputed
        )

    def __mul__(self, times: int) -> "FlopCount":
        return FlopCount(model=self.model * times, recomputed=self.recomputed * times)


def count_flops(fn: Callable, *args: Any, **kwargs: Any) -> FlopCount:
    """Counts matrix products and convolutions of `fn(*args, **kwargs)` without running it.

    The body of a `lax.scan` counts as often as it runs; of the branches of a `lax.cond` the most
    expensive one counts.

    Args:
      fn: Any function that JAX can trace, jitted or not, such as a whole train step.
      *args: Arrays, or `jax.ShapeDtypeStruct`s in their place.
      **kwargs: Likewise.

    Raises:
      ValueError: A `lax.while_loop` whose length nobody knows before it runs, or a hand-written
        kernel, holds matrix products.
    """
    return _count(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr, recomputes=False)


def _count(jaxpr: core.Jaxpr, *, recomputes: bool) -> FlopCount:
    total = FlopCount()
    for eqn in jaxpr.eqns:
        # `jax.checkpoint` marks what it computes again by this name.
        again = recomputes or "rematted_computation" in str(eqn.source_info.name_stack)
        name = eqn.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            flops = _dot(eqn) if name == "dot_general" else _conv(eqn)
            total += FlopCount(recomputed=flops) if again else FlopCount(model=flops)
            continue
        counts = [_count(inner, recomputes=again) for inner in _inner(eqn)]
        if not any(count.total for count in counts):
            continue
        if name in ("while", "pallas_call"):
            raise ValueError(
                f"cannot count the FLOPs of a {name} with matrix products in it: how often they "
                "run is not written in the program; use lax.scan or lax.fori_loop with a fixed "
                "number of steps"
            )
        if name == "cond":
            total += max(counts, key=lambda count: count.total)
        else:
            total += sum(counts, FlopCount()) * _repeats(eqn)
    return total


def _repeats(eqn) -> int:
    """How often the programs inside an equation run."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":  # written for one device
        shape = eqn.params["mesh"].shape
        return math.prod(shape[axis] for axis in eqn.params["newly_manual_axes"])
    return 1


def _inner(eqn) -> Iterator[core.Jaxpr]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _dot(eqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)


def _conv(eqn) -> int:
    """As if no kernel reached over the border; zeros that dilation puts in are not counted."""
    kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
    per_output = math.prod(kernel[axis] for axis in spec[1:])  # inputs of a group, and space
    stuffed = math.prod(eqn.params["lhs_dilation"])
    return 2 * eqn.outvars[0].aval.size * per_output // stuffed
