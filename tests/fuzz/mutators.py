"""Changes of a file's bytes: what damage does, and what somebody does who knows the format."""

import contextlib
import copy
import json
import re

import numpy as np

NUMBERS = [
    *(b"-1", b"0", b"1", b"2", b"255", b"65536", b"2147483647", b"4294967296", b"99999999999999"),
    *(b"9223372036854775807", b"18446744073709551616", b"1e999", b"-1e999", b"NaN", b"0.5"),
    *(b"9" * 5000, b"1e-400", b"null", b"true", b'"1"', b"[]", b"{}", b"-512", b"1e9"),
]
TEXTS = [
    *(b"\x1b]0;mine\x07\x1b[2J", b"\n", b"\r\n", b"\0", b"\xff", b"\xed\xa0\x80", b"\xe2\x80\xae"),
    *(b"\\u0000", b"\\ud800", b"../", b"/dev/zero", b"%d", b"|", b'"', b"'", b",", b"---\n", b"#"),
    *(b"{", b"[", b"<", b"x" * 2000, b"\xef\xbb\xbf", b"&a ", b"*a", b"!!python/none ", b"file:"),
    *(b"__proto__", b"null", b"concat:", b"2024-99-99", b"\t", b"$HOME", b"~/", b"Licence  MIT\n"),
]
SIZES = (0, 1, -1, 127, 128, 255, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63)
_DIGITS = re.compile(rb"-?\d+(\.\d+)?")


VALUES = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        255,
        2**31,
        2**63 - 1,
        10**15,
        0.5,
        -0.5,
        1e308,
        "",
        "a",
        "1",
    ),
    *("\x1b[2J", "a\nb", "../a", "/etc/passwd", "x" * 5000, "\ud800", "\0", "float32", "gelu"),
    *([], {}, [[]], [1], [1, 2], ["a"], {"a": 1}, {"kind": "x"}, [None], [0] * 1000, [64, 64]),
]


def mutate(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """Changes a file once to four times.

    Args:
      data: What a valid file holds.
      others: Valid files of the same door, from which pieces may come.
    """
    if data[:1] in (b"{", b"[") and rng.integers(2):
        with contextlib.suppress(ValueError):
            return _tree(data, rng)
    for _ in range(int(rng.integers(1, 5))):
        if not data:
            return data
        kind = _KINDS[int(rng.integers(len(_KINDS)))]
        data = kind(data, others, rng)
    return data


def _tree(data: bytes, rng: np.random.Generator) -> bytes:
    """JSON, of which one or two values change."""
    tree = json.loads(data)
    for _ in range(int(rng.integers(1, 3))):
        holders = [x for x in _holders(tree) if x]
        if not holders:
            break
        holder = holders[int(rng.integers(len(holders)))]
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = keys[int(rng.integers(len(keys)))]
        change = int(rng.integers(8))
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, dict):
            holder[str(VALUES[int(rng.integers(len(VALUES)))])] = holder.pop(key)
        elif change == 2:
            holder[key] = copy.deepcopy(holders[int(rng.integers(len(holders)))])
        elif change == 3:
            for _ in range(200):
                holder[key] = [holder[key]]
        else:
            holder[key] = copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])
    return json.dumps(tree).encode()


def _holders(tree):
    if isinstance(tree, dict | list):
        yield tree
        for held in tree.values() if isinstance(tree, dict) else tree:
            yield from _holders(held)


def _place(data, rng, size=1):
    return int(rng.integers(max(1, len(data) - size + 1)))


def _piece(data, rng, longest=64):
    at = _place(data, rng)
    return at, at + int(rng.integers(1, longest))


def _flip(data, others, rng):
    out, at = bytearray(data), _place(data, rng)
    out[at] ^= 1 << int(rng.integers(8))
    return bytes(out)


def _byte(data, others, rng):
    out, at = bytearray(data), _place(data, rng)
    out[at] = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))]))
    return bytes(out)


def _size(data, others, rng):
    """A number of 1 to 8 bytes that says a size, an offset or a count, in either order."""
    width = int(rng.choice([1, 2, 4, 8]))
    number = SIZES[int(rng.integers(len(SIZES)))] % 256**width
    stored = number.to_bytes(width, "little" if rng.integers(2) else "big")
    at = _place(data, rng, width)
    return data[:at] + stored + data[at + width :]


def _number(data, others, rng):
    """A number that is written in digits."""
    found = list(_DIGITS.finditer(data[:200_000]))
    if not found:
        return _byte(data, others, rng)
    match = found[int(rng.integers(len(found)))]
    return data[: match.start()] + NUMBERS[rng.integers(len(NUMBERS))] + data[match.end() :]


def _insert(data, others, rng):
    at = _place(data, rng)
    return data[:at] + TEXTS[int(rng.integers(len(TEXTS)))] + data[at:]


def _drop(data, others, rng):
    start, end = _piece(data, rng)
    return data[:start] + data[end:]


def _repeat(data, others, rng):
    start, end = _piece(data, rng, 16)
    times = int(rng.choice([2, 3, 100, 20_000]))
    return data[:end] + data[start:end] * times + data[end:]


def _cut(data, others, rng):
    return data[: _place(data, rng)]


def _move(data, others, rng):
    start, end = _piece(data, rng)
    at = _place(data, rng)
    return data[:at] + data[start:end] + data[at + end - start :]


def _splice(data, others, rng):
    other = others[int(rng.integers(len(others)))]
    start, end = _piece(other, rng, 512)
    at = _place(data, rng)
    return data[:at] + other[start:end] + data[at + end - start :]


def _fill(data, others, rng):
    start, end = _piece(data, rng)
    return data[:start] + bytes([int(rng.choice([0, 255, 32]))]) * (end - start) + data[end:]


_KINDS = [_flip, _flip, _byte, _size, _size, _number, _number, _insert, _insert, _drop, _repeat]
_KINDS += [_cut, _move, _splice, _fill]
