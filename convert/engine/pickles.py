"""The pickles inside torch files, looked through before anything reads them.

A pickle is a program. PyTorch's reader with `weights_only` runs only a few functions, but calls
these with whatever the file says: a buffer of any size, an encoding that takes for ever, tuples of
tuples that are hashed for ever or until the stack ends. What `torch.save` writes for weights needs
a small part of that, and only that part passes here.
"""

import pickletools
from typing import Any, NamedTuple

MAX_PICKLE = 1 << 26  # bytes; a table of contents of 3000 tensors is half a megabyte
_MAX_STEPS = 10_000_000  # about a hundred for every tensor and its two averages
_MAX_TUPLE = 1000  # values in a tuple and all tuples in it, each counted as often as it occurs

_REBUILD = {
    f"torch._utils._rebuild_{what}"
    for what in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state")
}
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"  # calls the function it is given
_BYTES = "_codecs.encode"
_CALLED = _REBUILD | {_WITH_ATTRIBUTES, _BYTES} | {
    *("collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device"),
    *("torch.serialization._get_layout", "builtins.set", "__builtin__.set"),
    *("builtins.complex", "__builtin__.complex"),
}  # fmt: skip
_STEPS = {
    *("PROTO", "STOP", "MARK", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL"),
    *("REDUCE", "NEWOBJ", "BUILD", "BINPERSID", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "NONE", "NEWFALSE", "NEWTRUE", "BININT"),
    *("BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
    *("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"),
}
# What lies below stays, and is one of these.
_CHANGING = {
    **dict.fromkeys(("APPEND", "APPENDS"), ("EMPTY_LIST",)),
    **dict.fromkeys(
        ("SETITEM", "SETITEMS"), ("EMPTY_DICT", "collections.OrderedDict", "collections.Counter")
    ),
    "BUILD": None,
}


class NumpyValue:
    """Takes the place of numpy's numbers and arrays in a pickle, whose values nothing here needs.

    Numpy's own functions would make one of any size out of what the file says.
    """

    def __init__(self, *parts: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


NUMPY = (
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),  # numpy 1's and 2's
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    "numpy.dtype",
)
"""Functions that a pickle with numpy's numbers and arrays calls, as a state of its randomness."""

NUMPY_TYPES = ("numpy.ndarray",)
"""What such a pickle names besides, and does not call."""


class _Value(NamedTuple):
    size: int = 1  # of a tuple with all tuples in it
    text: str = (
        ""  # of a string; of a function its name; of others the step or function they are of
    )
    parts: tuple["_Value", ...] = ()  # of a tuple


class WantsCode(ValueError):
    """A pickle calls a function that weights do not need; the message is its name."""


def check(pickle: bytes) -> None:
    """Looks through a pickle, without making any of its objects.

    Raises:
      WantsCode: It calls what no weights need.
      ValueError: It is damaged, or holds what `torch.save` does not write for weights.
    """
    try:
        _run(pickle)
    except (IndexError, KeyError) as error:
        raise ValueError("its pickle takes what it has not put") from error


def _run(pickle: bytes) -> None:
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[int, _Value] = {}
    for count, (step, argument, _) in enumerate(pickletools.genops(pickle)):
        name = step.name
        if name not in _STEPS:
            raise ValueError(f"its pickle holds {name}, which torch.save does not write")
        if count > _MAX_STEPS:
            raise ValueError(f"its pickle has more than {_MAX_STEPS} steps")
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        else:
            slices = step.stack_before[-1:] == [pickletools.stackslice]
            start = marks.pop() if slices else len(stack) - len(step.stack_before)
            taken = tuple(stack[start:])
            if name in _CHANGING:
                start += not slices
                del stack[start:]
                if _CHANGING[name] and stack[-1].text not in _CHANGING[name]:
                    raise ValueError(f"its pickle holds {name} for what takes no items")
            elif step.stack_after:
                stack[start:] = [_made(name, argument, taken)]


def _made(name: str, argument: Any, taken: tuple[_Value, ...]) -> _Value:
    """What a step leaves in place of what it has taken."""
    if name == "GLOBAL":
        return _Value(text=argument.replace(" ", "."))
    if name == "BINUNICODE":
        return _Value(text=argument)
    if name in ("REDUCE", "NEWOBJ"):
        _check_call(taken[0].text, taken[1].parts)
        return _Value(text=taken[0].text)
    if name.startswith("TUPLE"):
        size = 1 + sum(value.size for value in taken)
        if size > _MAX_TUPLE:
            raise ValueError(f"its pickle holds a tuple of more than {_MAX_TUPLE} values")
        return _Value(size, "", taken)
    return _Value(text=name)


def _check_call(function: str, arguments: tuple[_Value, ...]) -> None:
    if function.startswith("torch._utils._rebuild_") and function not in _REBUILD:
        raise ValueError("it holds a sparse, quantised or otherwise unusual tensor")
    if function not in _CALLED and function not in NUMPY:
        raise WantsCode(function)
    if function == _BYTES and arguments[1].text not in ("latin1", "latin-1"):
        raise WantsCode(f"{function} to {arguments[1].text}")
    if function == _WITH_ATTRIBUTES and arguments[0].text not in _REBUILD:
        raise WantsCode(arguments[0].text)
