"""The folder of a run: whose it is, and what may change between two parts of one run."""

import contextlib
import errno
import fcntl
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from dicode_jax import config as config_lib
from dicode_jax.checkpoint import find_checkpoints
from dicode_jax.errors import UserError

__all__ = ["claim", "hold"]

# Fields that say how a run is done and not what it does: they may change when it is resumed.
# (Another mesh sums in another order, so that losses may differ in the last digits.)
FREE_FIELDS = ("sharding.", "data.num_workers", "data.prefetch", "data.max_broken")


def claim(workdir: pathlib.Path, config: Any) -> None:
    """Makes the folder and writes `config.json`, or checks that it is the one of the earlier run.

      When only fields that do not touch the result differ, or the earlier run did nothing yet (its
    options were wrong, say), the file is written anew.

    Raises:
        UserError: The folder cannot be written, or holds a run of another config.
    """
    path = workdir / "config.json"
    is_known = path.is_file() and _has_begun(workdir)
    if is_known:
        try:
            stored = config_lib.from_json(type(config), path)
        except UserError as error:
            raise UserError(
                f"{workdir} holds a run of another training, or of another version; take another "
                "--workdir"
            ) from error
        earlier = _leaves(config_lib.to_dict(stored))
        now = _leaves(config_lib.to_dict(config))
        differs = [k for k in sorted({*earlier, *now}) if earlier.get(k) != now.get(k)]
        changed = [
            f"{k} {earlier.get(k)} -> {now.get(k)}"
            for k in differs
            if not k.startswith(FREE_FIELDS)
        ]
        if changed:
            more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(changed[:5])}{more}); "
                "take another --workdir"
            )
    if jax.process_index() != 0 or (is_known and not differs):
        return
    try:
        (workdir / "samples").mkdir(parents=True, exist_ok=True)
        config_lib.to_json(config, path)
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror}") from error


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of the folder for as long as this process lives.

    Raises:
      UserError: Another run is at work in it.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        file = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is at work in {workdir}; stop it or take another --workdir"
            ) from None
        except OSError as error:  # a file system without locks
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
        yield


def _has_begun(workdir: pathlib.Path) -> bool:
    """Whether a run has left anything that depends on its config."""
    log = workdir / "metrics.jsonl"
    is_logged = log.is_file() and log.stat().st_size > 0
    return (
        is_logged
        or (workdir / "cache.npz").exists()
        or bool(find_checkpoints(workdir / "checkpoints"))
    )


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    out = {}
    for key, value in tree.items():
        out |= _leaves(value, f"{prefix}{key}.")
    return out
