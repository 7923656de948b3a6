"""The kernels of a program that XLA compiled for a GPU, read from its text: bytes, flops, wastes.

A kernel reads its operands and writes its results once; nothing is taken to stay in a cache.
"""

import dataclasses
import json
import math
import re
from collections import Counter

from benchmarks.hlo_costs import (
    Instruction,
    convolution_flops,
    dims,
    dot_flops,
    nbytes,
    parse,
    turns,
)

# What a good kernel reaches of the H200's 4.8 TB/s and of its 989 TFLOP/s in bfloat16, dense.
BYTES_PER_SECOND, FLOPS_PER_SECOND = 4.3e12, 790e12

_NO_KERNEL = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota"),
    *("opt-barrier", "partition-id", "replica-id", "get-dimension-size"),
}
_SLICES = {"dynamic-slice", "slice", "gather"}
_MOVES = _SLICES | {
    *("parameter", "constant", "bitcast", "reshape", "transpose", "copy", "convert", "tuple"),
    *("concatenate", "broadcast", "get-tuple-element", "iota", "pad"),
}
# Of which one element may need all of an operand of the same size.
_MIXES = {"dot", "convolution", "reduce", "reduce-window", "sort", "scatter", "gather", "fusion"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One launch of the program, or of each turn of the loops around it.

    Attributes:
      kind: "product", "convolution", "attention", "copy", "reduction" or "elementwise".
      loops: Turns of the loops around it, the outermost first.
      bytes: Read and written.
      flops: Of products and convolutions, 2 for a multiply-add.
      dtype: Of its first array operand.
      waste: "conversion" or "copy" of an argument of the program inside a loop, which every turn
        repeats; else None.
    """

    name: str
    kind: str
    loops: tuple[int, ...]
    bytes: float
    flops: float
    dtype: str
    waste: str | None

    @property
    def times(self) -> int:
        """How often it runs."""
        return math.prod(self.loops)

    @property
    def seconds(self) -> float:
        """No H200 runs it once in less."""
        return max(self.bytes / BYTES_PER_SECOND, self.flops / FLOPS_PER_SECOND)


def kernels(text: str) -> list[Kernel]:
    """All kernels of an optimised module.

    Raises:
      ValueError: A loop's number of turns cannot be read from the text.
    """
    computations, entry = parse(text)
    arguments = {i.name for i in computations[entry] if i.opcode == "parameter"}
    found: list[Kernel] = []
    _walk(computations, entry, arguments, {}, (), found)
    return found


def summary(found: list[Kernel], *loops: int) -> dict:
    """Sums over a program, and of a step: a turn of its outer loops, all of it without any.

    Args:
      found: Its kernels.
      loops: Turns of each outer loop whose turns are steps.

    Raises:
      ValueError: No loop turns so often.
    """
    steps = sum(loops) or 1
    total: dict = {kind: Counter() for kind in ("bytes", "kernels")}
    for k in found:
        total["bytes"][k.kind] += k.times * k.bytes
        total["kernels"][k.kind] += k.times
    inside = [k for k in found if not loops or (k.loops and k.loops[0] in loops)]
    if not set(loops) <= {k.loops[0] for k in inside if k.loops}:
        raise ValueError(f"the outer loops of this program do not turn {loops} times")

    def count(which) -> int:
        return sum(k.times for k in inside if which(k)) // steps

    return {
        "flops": sum(k.times * k.flops for k in found),
        "bytes": sum(total["bytes"].values()),
        "bytes_by_kind": dict(total["bytes"]),
        "kernels_by_kind": dict(total["kernels"]),
        "kernels": sum(total["kernels"].values()),
        "kernels_per_step": count(lambda k: True),
        "bytes_per_step": sum(k.times * k.bytes for k in inside) / steps,
        "conversions_per_step": count(lambda k: k.waste == "conversion"),
        "copies_per_step": count(lambda k: k.waste == "copy"),
        "wasted_bytes_per_step": sum(k.times * k.bytes for k in inside if k.waste) / steps,
        "float32_products": sum(
            k.times for k in found if k.kind in ("product", "attention") and k.dtype == "f32"
        ),
        "float32_convolutions": sum(
            k.times for k in found if k.kind == "convolution" and k.dtype == "f32"
        ),
        "bound_seconds": sum(k.times * k.seconds for k in found),
    }


def _walk(computations, name: str, given: set, tuples: dict, loops: tuple, found: list) -> None:
    """Adds the kernels of a computation.

    `given` names the instructions whose value is an argument of the program, perhaps moved, and
    `tuples` the places of those that are tuples where such values lie.
    """
    instructions = computations[name]
    given, tuples = set(given), dict(tuples)
    shapes = {i.name: i.shape for i in instructions}
    for i in instructions:
        if i.opcode == "get-tuple-element":
            place = int(re.search(r"index=(\d+)", i.rest)[1])
            if place in tuples.get(i.operands[0], ()):
                given.add(i.name)
        elif i.opcode == "tuple":
            tuples[i.name] = {n for n, x in enumerate(i.operands) if x in given}
        elif i.opcode == "while":
            body, condition = (
                re.search(rf"{which}=%?([\w.\-]+)", i.rest)[1] for which in ("body", "condition")
            )
            inside = (*loops, turns(i, computations))
            kept = tuples.get(i.operands[0], set()) & _kept(computations[body])
            tuples[i.name] = kept
            for part in (body, condition):
                argument = next(x.name for x in computations[part] if x.opcode == "parameter")
                _walk(computations, part, set(), {argument: kept}, inside, found)
        elif i.opcode in ("call", "conditional", "async-start"):
            called = re.findall(r"(?:calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", i.rest)
            for part in called:
                _walk(computations, part, set(), {}, loops, found)
        elif i.opcode == "bitcast":
            if i.operands[0] in given:
                given.add(i.name)
        elif i.opcode not in _NO_KERNEL and not i.opcode.endswith("-done"):
            inner = computations[_called(i)] if i.opcode == "fusion" else None
            kernel = _kernel(i, inner, shapes, given, loops)
            if kernel.waste:
                given.add(i.name)  # a moved argument is one still
            found.append(kernel if loops else dataclasses.replace(kernel, waste=None))


def _kept(body: list[Instruction]) -> set[int]:
    """Places of a loop's tuple that no turn changes."""
    root = next(i for i in body if i.is_root)
    at = {
        i.name: int(re.search(r"index=(\d+)", i.rest)[1])
        for i in body
        if i.opcode == "get-tuple-element"
    }
    return {n for n, x in enumerate(root.operands) if at.get(x) == n}


def _called(i: Instruction) -> str:
    return re.search(r"calls=%?([\w.\-]+)", i.rest)[1]


def _kernel(i: Instruction, inner, shapes, given: set, loops: tuple) -> Kernel:
    kind, flops = _work(i, inner, shapes)
    read, written = _traffic(i, inner, shapes)
    waste = None
    if kind == "copy" and any(x in given for x in i.operands):
        changes = any(x.opcode == "convert" for x in inner or [i])
        waste = "conversion" if changes else "copy"
    return Kernel(
        name=i.name,
        kind=kind,
        loops=loops,
        bytes=read + written,
        flops=flops,
        dtype=shapes[i.operands[0]].partition("[")[0] if i.operands else "",
        waste=waste,
    )


def _work(i: Instruction, inner, shapes) -> tuple[str, float]:
    """Kind of a kernel and its flops."""
    if inner is not None:
        inside = {x.name: x.shape for x in inner}
        flops = sum(dot_flops(x, inside) for x in inner if x.opcode == "dot")
        if flops:
            return "product", flops
        if all(_is_move(x) for x in inner):
            return "copy", 0.0
        has_sum = any(x.opcode == "reduce" for x in inner)
        return "reduction" if has_sum else "elementwise", 0.0
    if i.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', i.rest)[1]
        if "matmul" in target or "gemm" in target:
            return "product", _product_flops(i, shapes)
        if "$conv" in target:
            return "convolution", _conv_flops(i, shapes, target)
        if "fmha" in target:
            return "attention", _attention_flops(i, shapes, target)
    if i.opcode == "dot":
        return "product", dot_flops(i, shapes)
    if i.opcode == "convolution":
        return "convolution", convolution_flops(i, shapes)
    if i.opcode in ("reduce", "sort"):
        return "reduction", 0.0
    return ("copy" if _is_move(i) else "elementwise"), 0.0


def _is_move(i: Instruction) -> bool:
    is_index = not i.shape.startswith("(") and i.shape[:3] in ("s32", "pre", "u32", "s64")
    return i.opcode in _MOVES or i.opcode == "dynamic-update-slice" or is_index


def _config(i: Instruction) -> dict:
    text = i.rest.partition("backend_config=")[2]
    return json.JSONDecoder().raw_decode(text)[0] if text.startswith("{") else {}


def _first(shape: str) -> str:
    """The result of a library call that also returns its workspace."""
    return re.search(r"\w+\[[\d,]*\]", shape)[0]


def _product_flops(i: Instruction, shapes) -> float:
    numbers = _config(i)["gemm_backend_config"]["dot_dimension_numbers"]
    lhs = dims(shapes[i.operands[0]])
    depth = math.prod(lhs[int(d)] for d in numbers["lhs_contracting_dimensions"])
    return 2.0 * depth * math.prod(dims(_first(i.shape)))


def _conv_flops(i: Instruction, shapes, target: str) -> float:
    """Of a convolution or a gradient of one, which has the flops of the convolution itself."""
    result = _first(i.shape)
    one, two = (shapes[x] for x in i.operands[:2])
    # Labels and window are those of the forward convolution: input, kernel -> output.
    parts = {
        "Forward": (one, two, result),
        "Input": (result, two, one),
        "Filter": (one, result, two),
    }
    key = next((k for k in ("Input", "Filter") if f"Backward{k}" in target), "Forward")
    lhs, rhs, out = parts[key]
    names = {"lhs": lhs, "rhs": rhs}
    forward = dataclasses.replace(i, operands=["lhs", "rhs"], shape=out)
    return convolution_flops(forward, names)


def _attention_flops(i: Instruction, shapes, target: str) -> float:
    """Two products forward, five backward; half of them where the mask is causal."""
    config = _config(i)["cudnn_fmha_backend_config"]
    sizes = map(int, config["intermediate_tensor_shape"]["dimensions"])  # of the weights
    products = 5 if "Backward" in target else 2
    total = 2.0 * products * dims(shapes[i.operands[0]])[-1] * math.prod(sizes)
    return total / 2 if config["mask_type"] == "CAUSAL" else total


def _traffic(i: Instruction, inner, shapes) -> tuple[float, float]:
    """Bytes read and written. A slice reads what it gives, an update in place what it changes."""
    if inner is None:
        if i.opcode in _SLICES:
            return nbytes(i.shape), nbytes(i.shape)
        if i.opcode == "dynamic-update-slice":
            size = nbytes(shapes[i.operands[1]])
            return size, size
        if i.opcode == "custom-call":  # all results but the workspace, bytes in the last place
            parts = re.findall(r"\w+\[[\d,]*\]", i.shape)
            if len(parts) > 1 and parts[-1][:2] in ("s8", "u8"):
                parts = parts[:-1]
            written = sum(map(nbytes, parts))
        else:
            written = nbytes(i.shape)
        return sum(nbytes(shapes[x]) for x in i.operands), written
    by_name = {x.name: x for x in inner}
    root = next(x for x in inner if x.is_root)
    roots = [by_name[x] for x in root.operands] if root.opcode == "tuple" else [root]
    written = 0.0
    for x in roots:
        while x.opcode in ("bitcast", "reshape"):
            x = by_name[x.operands[0]]
        updates = x.opcode == "dynamic-update-slice"
        written += nbytes(by_name[x.operands[1]].shape if updates else x.shape)
    return _read(inner), written


def _read(inner: list[Instruction]) -> float:
    """Bytes that a fusion reads: of an operand that is sliced, at once or computed upon first, what
    goes into the slices."""
    size = {x.name: math.prod(dims(x.shape)) for x in inner if not x.shape.startswith("(")}
    # Elements; what an instruction reads stands before it.
    wanted = {x.name: size[x.name] if x.is_root else 0 for x in inner if x.name in size}
    for x in reversed(inner):
        for place, operand in enumerate(x.operands):
            if operand not in size:
                continue
            found = size[operand]
            if x.opcode == "dynamic-update-slice" and place == 0:
                found = 0
            elif x.name in size:
                same = size[x.name] == size[operand] and x.opcode not in _MIXES
                sliced = x.opcode in _SLICES and place == 0
                if same or sliced or x.opcode == "broadcast":
                    found = min(found, wanted[x.name])
            wanted[operand] = min(size[operand], wanted[operand] + found)
    read = (x for x in inner if x.opcode == "parameter" and size.get(x.name))
    return sum(nbytes(x.shape) * wanted[x.name] / size[x.name] for x in read)
