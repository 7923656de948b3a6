"""Training checkpoints: Orbax for the state, JSON for the place in the data."""

import dataclasses
import errno
import math
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from dicode_jax.errors import UserError
from dicode_jax.typing import PyTree

__all__ = ["Checkpointer", "find_checkpoints", "is_checkpoint", "read_parameters"]

# What can go wrong with a disk. tensorstore reports it as ValueError, a barrier as RuntimeError.
_FAILURES = (OSError, ValueError, RuntimeError)

_STEP = re.compile(r"0|[1-9][0-9]*")

# What a checkpoint holds.
_PARTS = frozenset(
    {"state", "data", "metrics", "descriptor", "_CHECKPOINT_METADATA", "commit_success.txt"}
)


class Checkpointer:
    """Saves and restores `(state, place in the data)`; writes are atomic and asynchronous.

    A checkpoint is written under a temporary name and renamed when it is whole; older ones are
    deleted after that, and never before. With several processes all of them make the same calls;
    the folder is one that all of them see.

    Args:
      workdir: Folder of the run; checkpoints go to `workdir/checkpoints/STEP`.
      keep: How many of the latest to keep.
      best: Name of the metric, given to `save`, whose smallest value keeps one more checkpoint.

    Raises:
      UserError: The folder cannot be written.
    """

    def __init__(
        self, workdir: str | pathlib.Path, *, keep: int = 2, best: str = "validation_loss"
    ):
        self.folder = pathlib.Path(workdir).resolve() / "checkpoints"
        self.keep = keep
        self._pending: int | None = None
        self._best = best

        def quality(metrics: Any) -> float:
            value = metrics.get(best) if isinstance(metrics, dict) else None
            return -value if isinstance(value, float) else -math.inf  # Orbax keeps the largest

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies.AnyPreservationPolicy(
                        [
                            policies.LatestN(keep),
                            policies.BestN(get_metric_fn=quality, n=1),
                            _TouchedByOthers(self.folder),
                        ]
                    ),
                    best_fn=quality,  # without it the metrics are not stored
                    cleanup_tmp_directories=True,  # what a killed run was just writing
                ),
            )
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {_reason(error)}") from error
        except Exception as error:  # Orbax names none for a damaged checkpoint
            raise UserError(
                f"a checkpoint in {self.folder} is damaged: {_reason(error)}; move it away to go "
                "on from another"
            ) from error

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, None when there is none."""
        return max(find_checkpoints(self.folder), default=None)

    def require_space(self, state: PyTree, *, whole_run: bool = False) -> None:
        """Makes sure that the disk has room for a checkpoint of `state`.

        Args:
          state: Arrays or their shapes.
          whole_run: Ask for the room that the run will need in all: `keep` checkpoints, the best
            one, and one that is being written, less those that are there already.

        Raises:
          UserError: It has not.
        """
        size, count = checkpoint_bytes(state), 1
        if whole_run:
            count = max(1, self.keep + 2 - len(find_checkpoints(self.folder)))
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {_reason(error)}") from error
        if free < count * size:
            many = f"{count} checkpoints of {_human(size)} each" if count > 1 else _human(size)
            raise UserError(
                f"the disk of {self.folder} has {_human(free)} free, and {many} must fit; "
                f"free some or take a smaller --keep ({self._last()})"
            )

    def save(
        self,
        step: int,
        state: PyTree,
        position: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving and returns; a step that is already saved is left alone.

        Args:
          position: The place in the data, ready for JSON.
          metrics: What was measured at this step; a checkpoint without the metric `best`, or with
            one that is not finite, is not a candidate for the best one.

        Raises:
          UserError: The disk is full, this save or the one before it failed, or the folder holds
            later steps.
        """
        if step == self.latest_step:
            return
        self.wait()
        self.require_space(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_without_keys(state)),
            data=ocp.args.JsonSave(dict(position)),
        )
        value = (metrics or {}).get(self._best, math.nan)
        stored = {self._best: value if math.isfinite(value) else None}
        self._pending = step
        try:
            saved = self._manager.save(step, args=args, metrics=stored)
        except _FAILURES as error:
            raise self._failed(error) from error
        if not saved:
            raise UserError(
                f"step {step} was not saved: {self.folder} already holds step {self.latest_step}; "
                "use another --workdir"
            )

    def check(self) -> None:
        """Raises what went wrong with a save in the background, without waiting for it."""
        if self._pending is None:
            return
        try:
            self._manager.check_for_errors()
        except _FAILURES as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          UserError: The save failed.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except _FAILURES as error:
            raise self._failed(error) from error
        self._pending = None

    def restore(self, state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The newest state and its place in the data.

        Args:
          state: Shapes, types and shardings (`jax.ShapeDtypeStruct`, or arrays) to restore into;
            these may be of another mesh than the one that saved.

        Raises:
          UserError: The checkpoint cannot be read.
        """
        step = self.latest_step
        plain = jax.tree.map(ocp.utils.to_shape_dtype_struct, _without_keys(state))
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(plain), data=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:  # Orbax names none for a damaged checkpoint
            raise UserError(
                f"cannot read {self.folder / str(step)}: {_reason(error)}; delete that folder to "
                "go on from the one before"
            ) from error
        state = restored["state"]
        return state.replace(rng=jax.random.wrap_key_data(state.rng)), restored["data"]

    def close(self) -> None:
        """Waits, then releases the manager."""
        self.wait()
        self._manager.close()

    def _failed(self, error: Exception) -> UserError:
        step, self._pending = self._pending, None
        return UserError(
            f"cannot save step {step} in {self.folder}: {_reason(error)} ({self._last()})"
        )

    def _last(self) -> str:
        step = self.latest_step
        return "there is no checkpoint yet" if step is None else f"the last checkpoint is {step}"


@dataclasses.dataclass(frozen=True)
class _TouchedByOthers:
    """Keeps what lies among the checkpoints but holds other files than these have.

    Orbax takes every folder named by a number for a checkpoint, and deletes it whole.
    """

    folder: pathlib.Path

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        return [not self._names(checkpoint.step) <= _PARTS for checkpoint in checkpoints]

    def _names(self, step: int) -> set[str]:
        folder = self.folder / str(step)
        return {entry.name for entry in folder.iterdir()} if os.path.isdir(folder) else set()


def find_checkpoints(folder: str | pathlib.Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, in order; unfinished ones have other names."""
    folder = pathlib.Path(folder)
    if not os.path.isdir(folder):
        return []
    return sorted(int(path.name) for path in folder.iterdir() if is_checkpoint(path))


def is_checkpoint(path: pathlib.Path) -> bool:
    """Whether a path is a folder that is called as whole checkpoints are."""
    return _STEP.fullmatch(path.name) is not None and os.path.isdir(path)


def checkpoint_bytes(state: PyTree) -> int:
    """Size on disk of a checkpoint, without the compression that may make it smaller."""
    leaves = jax.tree.leaves(_without_keys(state))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def read_parameters(
    folder: str | pathlib.Path, like: PyTree, *, step: int | None = None, use_ema: bool = True
) -> tuple[int, PyTree]:
    """Reads only the trained parameters of a checkpoint, for example to export them.

    Args:
      folder: A run's folder or its `checkpoints`.
      like: State of the trained parameters: shapes, types and (optionally) shardings.
      step: Which checkpoint; None takes the newest.
      use_ema: Take the moving average when the checkpoint has one.

    Returns:
      The step and a state like `like`.

    Raises:
      UserError: There is no such checkpoint, or it holds other parameters.
    """
    folder = pathlib.Path(folder).resolve()
    folder = folder / "checkpoints" if os.path.isdir(folder / "checkpoints") else folder
    steps = find_checkpoints(folder)
    if not steps:
        raise UserError(f"{folder} holds no checkpoint")
    step = steps[-1] if step is None else step
    if step not in steps:
        known = ", ".join(map(str, steps))
        raise UserError(f"{folder} holds no checkpoint of step {step}; it holds {known}")
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.PyTreeCheckpointer() as reader:
        path = folder / str(step) / "state"
        try:
            stored = reader.metadata(path).item_metadata
            if stored is None:
                raise UserError("its own notes of what it holds cannot be read")
            name = "ema" if use_ema and stored.tree.get("ema") is not None else "params"
            args = ocp.args.PyTreeRestore(
                {name: like},
                restore_args={name: ocp.checkpoint_utils.construct_restore_args(like)},
                partial_restore=True,
            )
            return step, reader.restore(path, args=args)[name]
        except Exception as error:  # Orbax names none for a damaged checkpoint
            raise UserError(f"cannot read {path}: {_reason(error)}") from error


def _without_keys(state: Any) -> Any:
    """Typed PRNG keys as plain integers, which is what is stored; arrays or their shapes."""
    if isinstance(state.rng, jax.ShapeDtypeStruct):
        plain = jax.eval_shape(jax.random.key_data, state.rng)
        return state.replace(rng=plain.update(sharding=state.rng.sharding))
    return state.replace(rng=jax.random.key_data(state.rng))


def _reason(error: BaseException) -> str:
    """One line; what the operating system said, when it is known."""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return "the disk is full"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text[:200] or type(error).__name__


def _human(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
