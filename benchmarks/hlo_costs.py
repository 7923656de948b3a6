"""What a compiled program computes and sends, read from its text (XLA's HLO).

`cost_analysis()` counts the body of a loop once; here it counts as often as the loop turns.
"""

import dataclasses
import math
import re
from collections import Counter

import numpy as np

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one run of a program on one device.

    Attributes:
      flops: Of matrix products and convolutions, 2 for a multiply-add.
      sent: Bytes that the device sends, by kind of collective and in a ring: of a group of n
        devices that hold s bytes whole, all-gather, reduce-scatter and all-to-all send s (n-1)/n,
        all-reduce twice that, collective-permute s.
      count: How often each kind of collective runs.
    """

    flops: float
    sent: dict[str, float]
    count: dict[str, int]


@dataclasses.dataclass
class Instruction:
    name: str
    shape: str  # as text, may be a tuple
    opcode: str
    operands: list[str]
    rest: str
    is_root: bool


def program_costs(text: str, num_devices: int) -> Costs:
    """Counts a program that was compiled for `num_devices`.

    Raises:
      ValueError: A loop's number of turns cannot be read from the text.
    """
    computations, entry = parse(text)
    memo: dict[str, tuple[float, Counter, Counter]] = {}

    def cost(name: str):
        if name not in memo:
            memo[name] = add_up(computations[name])
        return memo[name]

    def add_up(instructions):
        flops, sent, count = 0.0, Counter(), Counter()
        shapes = {i.name: i.shape for i in instructions}
        for i in instructions:
            kind = i.opcode.removesuffix("-start")
            if i.opcode == "dot":
                flops += dot_flops(i, shapes)
            elif i.opcode == "convolution":
                flops += convolution_flops(i, shapes)
            elif kind in COLLECTIVES:
                kind, amount = _sent(kind, i, shapes, num_devices)
                sent[kind] += amount
                count[kind] += 1
                continue
            called = _CALLED.findall(i.rest)
            if i.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
                if branches:
                    called += [b.strip().lstrip("%") for b in branches[1].split(",")]
            elif i.opcode in ("reduce", "reduce-window", "scatter", "sort", "map", "async-done"):
                continue
            if i.opcode == "async-update":
                continue
            times = turns(i, computations) if i.opcode == "while" else 1
            for name in called:
                inner = cost(name)
                scattered = "all-reduce-scatter" in name  # the TPU's way to write reduce-scatter
                flops += times * inner[0]
                for kind, amount in inner[1].items():
                    if scattered and kind == "all-reduce":
                        kind, amount = "reduce-scatter", amount / 2
                    sent[kind] += times * amount
                for kind, n in inner[2].items():
                    count["reduce-scatter" if scattered else kind] += times * n
        return flops, sent, count

    flops, sent, count = cost(entry)
    return Costs(flops=flops, sent=dict(sent), count=dict(count))


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            opcode = _OPCODE.search(" " + found[3].partition("metadata=")[0])
            if opcode is None:
                continue
            start = opcode.end() - 1
            shape, body = found[3][: opcode.start()], found[3][start:]
            inside, rest = _split_parenthesis(body)
            operands = re.findall(r"%([\w.\-]+)", inside)
            if opcode[1] in ("constant", "parameter"):
                rest = f"({inside}){rest}"
            is_root = found[1] is not None
            current.append(Instruction(found[2], shape, opcode[1], operands, rest, is_root))
    if entry is None:
        raise ValueError("the text holds no entry computation")
    return computations, entry


def _split_parenthesis(text: str) -> tuple[str, str]:
    """`inside) rest` after an opening parenthesis, split at the one that closes it."""
    depth = 1
    for position, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return text[:position], text[position + 1 :]
    return text, ""


def dims(shape: str) -> list[int]:
    return [int(d) for d in _SHAPE.search(shape)[2].split(",") if d]


def nbytes(shape: str) -> float:
    """Bytes of a shape; of a tuple, of all its parts."""
    total = 0.0
    for kind, dims in _SHAPE.findall(shape):
        size = _BYTES.get(kind) or int(re.search(r"\d+", kind)[0]) / 8
        total += size * math.prod(int(d) for d in dims.split(",") if d)
    return total


def _group_size(rest: str, num_devices: int) -> int:
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(found[2])
    mesh = r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\([^{]*\))?\s*\{([^}]*)\}"
    if found := re.search(mesh, rest):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", found[2]))
    groups = re.search(r"replica_groups=\S+", rest)
    if groups and groups[0].rstrip(",") != "replica_groups={}":
        raise ValueError(f"cannot read {groups[0]}")
    return num_devices


def _sent(kind: str, i: Instruction, shapes, num_devices: int) -> tuple[str, float]:
    """The kind of a collective and what one device sends in a ring."""
    given = sum(nbytes(shapes[name]) for name in i.operands)
    n = _group_size(i.rest, num_devices)
    if kind == "all-gather":  # what goes in is one part of n
        return kind, given * (n - 1)
    if kind == "collective-permute":
        return kind, given
    share = given * (n - 1) / n
    return kind, 2 * share if kind == "all-reduce" else share


def turns(loop: Instruction, computations) -> int:
    """How often a loop turns."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    bounds = [
        int(value[1])
        for i in condition
        if i.opcode == "constant" and (value := re.match(r"\((\d+)\)", i.rest))
    ]
    if len(bounds) != 1:
        raise ValueError(f"cannot read how often the loop {loop.name} turns")
    return bounds[0]


def dot_flops(i: Instruction, shapes) -> float:
    lhs = dims(shapes[i.operands[0]])
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
    depth = math.prod(lhs[int(d)] for d in contracted[1].split(",") if d)
    return 2.0 * math.prod(dims(i.shape)) * depth


def convolution_flops(i: Instruction, shapes) -> float:
    """Multiply-adds that meet neither padding nor the holes of dilation, times 2."""
    labels = re.search(r"dim_labels=([\w]+)_([\w]+)->([\w]+)", i.rest)
    lhs, rhs = (dims(shapes[name]) for name in i.operands[:2])
    out = dims(i.shape)
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", _window(i.rest)))
    spatial = sorted(letter for letter in labels[3] if letter.isdigit())

    def values(name, default):
        text = window.get(name)
        return text.split("x") if text else [default] * len(spatial)

    pairs = 1
    for d, pad, stride, holes, spread in zip(
        spatial,
        values("pad", "0_0"),
        values("stride", "1"),
        values("lhs_dilate", "1"),
        values("rhs_dilate", "1"),
    ):
        size, kernel = lhs[labels[1].index(d)], rhs[labels[2].index(d)]
        at = np.arange(out[labels[3].index(d)])[:, None] * int(stride)
        at = at + np.arange(kernel) * int(spread) - int(pad.split("_")[0])
        inside = (at >= 0) & (at <= (size - 1) * int(holes)) & (at % int(holes) == 0)
        pairs *= int(inside.sum())
    depth = rhs[labels[2].index("i")]
    batch, features = out[labels[3].index("b")], out[labels[3].index("f")]
    groups = re.search(r"batch_group_count=(\d+)", i.rest)
    lhs_batch = lhs[labels[1].index("b")]
    if groups:  # each output sees its group's rows only
        batch = lhs_batch // int(groups[1])
    return 2.0 * batch * features * depth * pairs


def _window(rest: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", rest)
    return found[1] if found else ""
