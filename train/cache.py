"""Examples that a frozen model encodes once, kept on disk beside a run."""

import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from dicode_jax.data.stream import BatchStream
from dicode_jax.errors import UserError
from dicode_jax.storage.files import atomic_path

Encode = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class Cache:
    """The first examples of a stream, encoded; floating-point arrays are kept in float16.

    The file is written by process 0, when it is whole, so that a stopped run leaves none. It is
    read again by a run that goes on, whose config says that nothing has changed.

    Args:
      path: The `.npz` file, in a folder that all processes see.
      stream: Gives the examples before encoding, whole batches to one process; it is closed.
      encode: Turns a batch into arrays whose first axis runs over examples.
      count: How many examples are kept.

    Attributes:
      arrays: By name, `[count, ...]`.
      names: What each example was read from, `[count]`.

    Raises:
      UserError: The file holds another number of examples.
    """

    def __init__(self, path: pathlib.Path, stream: BatchStream, encode: Encode, *, count: int):
        if not path.is_file() and jax.process_index() == 0:
            _write(path, stream, encode, count)
        stream.close()
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(str(path))
        with np.load(path) as file:
            self.arrays = dict(file)
        self.names = self.arrays.pop("ids")
        if len(self.names) != count:
            raise UserError(
                f"{path} holds {len(self.names)} examples, the config wants {count}; delete it"
            )


def _write(path: pathlib.Path, stream: BatchStream, encode: Encode, count: int) -> None:
    from tqdm import tqdm

    parts, done = [], 0
    with tqdm(total=count, desc="encoding", unit="example") as bar:
        while done < count:
            batch = next(stream)
            ids = batch.pop("ids")
            encoded = {name: np.asarray(array) for name, array in encode(batch).items()}
            is_float = {name: array.dtype.kind in "fV" for name, array in encoded.items()}
            parts.append(
                {n: a.astype(np.float16) if is_float[n] else a for n, a in encoded.items()}
                | {"ids": ids}
            )
            bar.update(min(len(ids), count - done))
            done += len(ids)
    whole = {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **whole)
