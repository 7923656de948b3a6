"""The folder of a run: whose it is, and what may change between two parts of one run."""

import contextlib
import errno
import fcntl
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any

import jax

from dicode_jax import config as config_lib
from dicode_jax.errors import UserError
from dicode_jax.kinds import CONFIG_FILE
from dicode_jax.storage.files import read_object
from dicode_jax.training.checkpoint import find_checkpoints

__all__ = ["check", "claim", "has_begun", "hold", "stored_config"]

LOCK = ".lock"
# What a run leaves besides its config. Where one of these is without it, it is somebody else's.
RUN_FILES = (
    *("body", "checkpoints", "encoded", "metrics.jsonl", "model", "nonfinite", "profile"),
    *("samples", "tensorboard", "tokenizer.json", "wandb", "wandb_id.txt"),
)
# Fields that every training has, by which its `config.json` is known from other files of that name.
COMMON_FIELDS = frozenset({"num_steps", "batch_size", "optim", "sharding", "seed"})

# Fields that say how a run is done and not what it does: they may change when it is resumed.
# (Another mesh sums in another order, so that losses may differ in the last digits.) `num_steps`
# may grow as well.
FREE_FIELDS = (
    *("sharding.", "data.num_workers", "data.prefetch", "data.max_broken"),
    "optim.accumulate_steps",
)


_held: set[pathlib.Path] = set()  # by this process


def check(workdir: pathlib.Path, config: Any) -> bool:
    """Whether `claim` would write `config.json`, or change it; nothing is written here.

    Raises:
      UserError: The folder holds a run of another config, or things of a run's names that no run
        has left, such as links.
    """
    path = workdir / CONFIG_FILE
    if jax.process_index() == 0:
        _refuse_links(workdir)
    if not os.path.lexists(path):
        if jax.process_index() == 0:
            _refuse_others(workdir)
        return True
    if not _is_of_a_training(path):
        raise UserError(f"{path} is not the config of a training; take another --workdir")
    if not has_begun(workdir):
        return True
    try:
        stored = config_lib.from_json(type(config), path)
    except UserError as error:
        raise UserError(
            f"{workdir} holds a run of another training, or of another version; take another "
            "--workdir"
        ) from error
    earlier = config_lib.leaves(config_lib.to_dict(stored))
    now = config_lib.leaves(config_lib.to_dict(config))
    if earlier.get("data.kind") == "auto":  # the last release noted it before it looked
        earlier["data.kind"] = now["data.kind"]
    differs = [k for k in sorted({*earlier, *now}) if earlier.get(k) != now.get(k)]
    changed = [
        f"{k} {earlier.get(k)} -> {now.get(k)}"
        for k in differs
        if not k.startswith(FREE_FIELDS) and not (k == "num_steps" and now[k] > earlier[k])
    ]
    if changed:
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:5])}{more}); "
            "take another --workdir"
        )
    return bool(differs)


def claim(workdir: pathlib.Path, config: Any) -> str | None:
    """Makes the folder and writes `config.json`, or checks that it is the one of the earlier run.

    When only fields that do not touch the result differ, or the earlier run did nothing yet (its
    options were wrong, say), the file is written anew. It is written only while the folder is held
    (see `hold`), so that the run that is at work in it keeps its own.

    Returns:
      What the learning rate does now that the run has become longer, None when it has not.

    Raises:
      UserError: The folder cannot be written, another run is at work in it, or it holds a run of
        another config or what is no run's.
    """
    if not check(workdir, config) or jax.process_index() != 0:
        return None
    is_held = workdir.resolve() in _held
    with contextlib.nullcontext() if is_held else hold(workdir):
        if not check(workdir, config):
            return None
        path = workdir / CONFIG_FILE
        has_earlier = has_begun(workdir)
        earlier = config_lib.from_json(type(config), path).num_steps if has_earlier else None
        config_lib.to_json(config, path)
        try:
            (workdir / "samples").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {workdir}: {error.strerror}") from error
    if earlier in (None, config.num_steps):
        return None
    return (
        f"num_steps {earlier} -> {config.num_steps}: from here on the learning rate is that of a "
        f"run of {config.num_steps} steps ({config.optim.schedule})"
    )


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of the folder, which is made if need be, until the block ends.

    Of several processes the first holds it, and the others wait until it does.

    Raises:
      UserError: Another run is at work in it.
    """
    if jax.process_index() != 0:
        _together(workdir)
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{workdir / LOCK} is a link; remove it") from error
        raise UserError(f"cannot write to {workdir}: {error.strerror}") from error
    place = workdir.resolve()
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise UserError(f"{workdir / LOCK} is no file; remove it")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is at work in {workdir}; stop it or take another --workdir"
            ) from None
        except OSError as error:  # a file system without locks
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
        _held.add(place)
        try:
            _together(workdir)
            yield
        finally:
            _held.discard(place)
    finally:
        os.close(file)


def _together(workdir: pathlib.Path) -> None:
    """No process goes on before the first one holds the folder; when that fails, none does."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"hold {workdir}")


def _refuse_others(workdir: pathlib.Path) -> None:
    """Refuses a folder without a config that holds what a run would write over or into."""
    for name in RUN_FILES:
        path = workdir / name
        is_empty = os.path.isdir(path) and not os.path.islink(path) and not any(path.iterdir())
        if os.path.lexists(path) and not is_empty:
            raise UserError(
                f"{workdir} holds {name}, but no config.json of a training; take another --workdir"
            )


def _refuse_links(workdir: pathlib.Path) -> None:
    """Refuses what lies in the place of a run's file or folder and would lead writing elsewhere.

    The run's folder itself may be a link. Weights & Biases lays links in its own.
    """
    todo = [workdir / name for name in (CONFIG_FILE, *RUN_FILES)]
    while todo:
        path = todo.pop()
        try:
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode) and path.name != "wandb":
                todo += path.iterdir()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise UserError(
                f"{path} is a link, a pipe or a device; a run wants its own files and folders: "
                "remove it, or take another --workdir, which may be a link as a whole"
            )


def _is_of_a_training(path: pathlib.Path) -> bool:
    try:
        return set(read_object(path, "a configuration")) >= COMMON_FIELDS
    except UserError:
        return False


def stored_config(workdir: pathlib.Path, config_type: type) -> Any:
    """The config of the run in a folder that goes on; None where none has begun, or another."""
    if not has_begun(workdir):
        return None
    try:
        return config_lib.from_json(config_type, workdir / CONFIG_FILE)
    except UserError:  # `check` tells it
        return None


def has_begun(workdir: pathlib.Path) -> bool:
    """Whether a run has left anything that depends on its config."""
    log = workdir / "metrics.jsonl"
    is_logged = os.path.isfile(log) and log.stat().st_size > 0
    return is_logged or bool(find_checkpoints(workdir / "checkpoints"))
