"""Hostile input for the fuzz tests, which all claim: it works, or one line says why not."""

import copy
import json
import os
import pathlib

from hypothesis import strategies as st

from dicode_jax.errors import UserError

NAMES = [
    *("a.mp4", "b.mp4", "./a.mp4", "x/../a.mp4", "../a.mp4", "/nowhere/a.mp4", "a b.mp4", "-a.mp4"),
    *("a:b.mp4", "50%.mp4", "#1.mp4", "a\nb.mp4", "a\rb.mp4", "\u2028.mp4", " .mp4", "C:\\a.mp4"),
    *("\u00e9.mp4", "e\u0301.mp4", "\U0001f600.mp4", "\ufeff.mp4", "[1].mp4", "{1,2}.mp4", "*.mp4"),
    *("file:///a.mp4", "~/a.mp4", "a.b.mp4", "A.MP4", "x" * 300 + ".mp4", "x/" * 60 + "a.mp4"),
    *(".mp4", "..mp4", "a.mp4/", "//a.mp4", "loop/a.mp4", "loop.mp4", "a.png", "p.webp", "a.gif"),
]
ODD_NAMES = [*NAMES, "a\0.mp4", "a\0/b.mp4", "\udcff.mp4", "\ud800.mp4", "", ".", "..", "/"]
DEEP, HUGE = "@@deep@@", "@@huge@@"  # what Python's own `json` does not write
WEIRD = [
    *(None, True, False, 0, -1, 1, 2, 10**400, -(10**30), 2**31, 2**63, 0.5, -0.5, 1e308, 5e-324),
    *(float("nan"), float("inf"), -float("inf"), HUGE, DEEP, "", "a", "1", "nan", "\0", "a\nb"),
    *("\ud800", "x" * 5000, [], [[]], [None], [1, 2], {}, {"a": 1}, {"kind": []}, {"kind": "x"}),
    *({"": {}}, [1] * 100, ["a", {}], "../a", "/etc/passwd", "float32", "gelu", 64, [64, 64]),
]
weird = st.one_of(
    st.sampled_from(WEIRD),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=6,
    ),
).map(copy.deepcopy)


def ends_well(call, *args, **options):
    """What a call returns, or None when it refuses in one line (or a list of things to mend).

    A command line may also end the program, after its help or what no parser understands.
    """
    try:
        return call(*args, **options)
    except SystemExit as end:
        if end.code in (0, 2):
            return None
        raise
    except UserError as error:
        lines = str(error).splitlines()
        numbered = [line.lstrip().startswith(f"{i}. ") for i, line in enumerate(lines)]
        assert len(lines) == 1 or ("things to mend" in lines[0] and all(numbered[1:])), lines
        return None


def tree(folder):
    """All that a folder holds: names, and what files and links say."""
    found = {}
    for path in sorted(pathlib.Path(folder).rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        else:
            found[str(path)] = path.read_bytes() if path.is_file() else None
    return found


def dumped(data):
    """JSON, in which what nests deeply and what is huge is put in its place."""
    text = json.dumps(data)
    text = text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    return text.replace(f'"{HUGE}"', "9" * 5000)


def _places(data, at=()):
    yield at
    items = enumerate(data) if isinstance(data, list) else ()
    for key, value in data.items() if isinstance(data, dict) else items:
        yield from _places(value, (*at, key))


@st.composite
def mutated(draw, data):
    """JSON data with up to three changes: a value of another kind, gone, or unknown."""
    data = json.loads(json.dumps(data))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([*_places(data)][1:] or [("x",)]))
        holder = data
        for key in way:
            holder = holder[key]
        change = draw(
            st.sampled_from(("value", "value", "value", "drop", "add", "rename", "whole"))
        )
        if change == "whole":
            if draw(st.integers(0, 5)) == 0:
                return draw(weird)
        elif not isinstance(holder, dict) or change == "value":
            holder[last] = draw(weird)
        elif change == "add":
            holder[draw(st.text(max_size=5))] = draw(weird)
        elif last in holder:
            value = holder.pop(last)
            if change == "rename":
                holder[draw(st.sampled_from([last.upper(), f"_{last}", f" {last}", "\ud800"]))] = (
                    value
                )
        if not isinstance(data, dict) or not data:
            return data
    return data
