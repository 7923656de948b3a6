"""Training checkpoints: Orbax for the state and the data iterator, in `WORKDIR/checkpoints`."""

import pathlib
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from dicode_jax.errors import UserError

__all__ = ["Checkpointer"]


class Checkpointer:
    """Saves and restores `(state, data iterator)`; writes are atomic and asynchronous.

    Args:
      workdir: Folder of the run; checkpoints go to `workdir/checkpoints/STEP`.
      keep: How many of the latest to keep.

    Raises:
      UserError: The folder cannot be written.
    """

    def __init__(self, workdir: str | pathlib.Path, *, keep: int = 2):
        folder = pathlib.Path(workdir).resolve() / "checkpoints"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error
        self._manager = ocp.CheckpointManager(
            folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: Any) -> None:
        """Starts saving; returns at once. A step that is already saved is left alone."""
        if step == self.latest_step:
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_without_keys(state)),
            data=grain.checkpoint.CheckpointSave(data),
        )
        if not self._manager.save(step, args=args):
            raise UserError(
                f"step {step} was not saved: {self._manager.directory} already holds step "
                f"{self.latest_step}; use another --workdir"
            )

    def restore(self, state: Any, data: Any) -> Any:
        """The newest state (shaped and placed like `state`); `data` is moved to where it was."""
        plain = _without_keys(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, plain)),
            data=grain.checkpoint.CheckpointRestore(data),
        )
        restored = self._manager.restore(self.latest_step, args=args)["state"]
        return restored.replace(rng=jax.random.wrap_key_data(restored.rng))

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the manager."""
        self._manager.close()


def _without_keys(state: Any) -> Any:
    """Typed PRNG keys as plain integers, which is what is stored."""
    return state.replace(rng=jax.random.key_data(state.rng))
