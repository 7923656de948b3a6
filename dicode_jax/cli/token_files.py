"""Files of deep tokens, semantic tokens and features: what they hold, or one line on why not."""

import os
import pathlib

from dicode_jax.errors import UserError, printable


def read_arrays(path: str | os.PathLike):
    """Reads a file that can be decoded: what `dicode encode` wrote, or features for Divot.

    Returns:
      `tokens` float32 [k, n, z]; or `features` [b, l, e] and, if the file has them,
      `null_features` [l, e]; or `semantic_tokens` int [n].

    Raises:
      UserError: there is no such file, or it holds neither features nor the deep tokens of two
        keyframes or more.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = pathlib.Path(path)
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}")
    try:
        arrays = load_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file; make one with: dicode encode"
        ) from error
    if set(arrays) - {"null_features"} == {"features"}:
        wanted = {"features": (2, 3), "null_features": (2,)}
        arrays = {n: _floats(path, f"{n} [l, e]", x, wanted[n]) for n, x in arrays.items()}
        features = arrays["features"]
        return arrays | {"features": features if features.ndim == 3 else features[None]}
    if list(arrays) == ["semantic_tokens"]:
        tokens = arrays["semantic_tokens"]
        if tokens.dtype.kind not in "iu" or tokens.ndim != 1 or not tokens.size:
            raise UserError(
                f"{path} holds an array {tokens.dtype} {list(tokens.shape)}; want semantic tokens, "
                "whole numbers [n]"
            )
        return arrays
    if list(arrays) != ["tokens"]:
        held = ", ".join(printable(name, 60) for name in sorted(arrays)[:3]) or "nothing"
        raise UserError(f"{path} holds {held}, not deep tokens; make them with: dicode encode")
    wanted = "deep tokens [keyframes, tokens, width] of two keyframes or more"
    return {"tokens": _floats(path, wanted, arrays["tokens"], (3,), least=2)}


def _floats(path: pathlib.Path, wanted: str, array, ndims: tuple[int, ...], least: int = 1):
    """The array as float32.

    Raises:
      UserError: It is of another type or of other dimensions, or holds NaN or infinity.
    """
    import numpy as np

    is_wanted = array.dtype.kind == "f" and array.ndim in ndims and array.size
    if not is_wanted or len(array) < least:
        raise UserError(f"{path} holds an array {array.dtype} {list(array.shape)}; want {wanted}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{path} holds numbers that are not finite")
    return array


def check_tokens(path: pathlib.Path) -> None:
    """Refuses to replace anything but tokens: weights have the same extension."""
    message = f"{path} is there, and is no file of deep tokens; name another"
    try:
        arrays = read_arrays(path)
    except UserError as error:
        raise UserError(message) from error
    if not arrays.keys() & {"tokens", "semantic_tokens"}:
        raise UserError(message)
