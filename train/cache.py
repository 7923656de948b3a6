"""Examples that a frozen model encodes once, kept on disk beside a run."""

import pathlib
from collections.abc import Callable

import numpy as np

from dicode_jax.data.batches import Source
from dicode_jax.errors import UserError


class Cache:
    """The first examples of a source, encoded; floating-point arrays are kept in float16.

    The file is written when it is whole, so that a stopped run leaves none. It is read again by a
    run that goes on, whose config (`train.loop.claim`) says that nothing has changed.

    Args:
      path: The `.npz` file.
      source: Examples before encoding.
      encode: Turns a list of examples into arrays whose first axis runs over them.
      count: How many examples are kept.
      batch_size: Examples per call of `encode`.

    Raises:
      UserError: The file holds another number of examples.
    """

    def __init__(
        self,
        path: pathlib.Path,
        source: Source,
        encode: Callable[[list[dict[str, np.ndarray]]], dict[str, np.ndarray]],
        *,
        count: int,
        batch_size: int,
    ):
        if not path.is_file():
            _write(path, source, encode, count, batch_size)
        with np.load(path) as file:
            self.arrays = dict(file)
        held = {len(array) for array in self.arrays.values()}
        if held != {count}:
            raise UserError(
                f"{path} holds {max(held)} examples, the config wants {count}; delete it"
            )

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[index] for name, array in self.arrays.items()}


def _write(path, source, encode, count, batch_size) -> None:
    from tqdm import trange

    parts = []
    for start in trange(0, count, batch_size, desc="encoding", unit="batch"):
        encoded = encode([source[i] for i in range(start, start + batch_size)])
        encoded = {name: np.asarray(array) for name, array in encoded.items()}
        is_float = {name: array.dtype.kind == "f" for name, array in encoded.items()}
        parts.append({n: a.astype(np.float16) if is_float[n] else a for n, a in encoded.items()})
    whole = {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **whole)
    temporary.replace(path)
