"""What a run does about a loss or gradients that are not finite."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from dicode_jax.errors import UserError, printable
from dicode_jax.storage.files import atomic_path

__all__ = ["NonFiniteGuard"]


class NonFiniteGuard:
    """Looks at every step; keeps the batch of a bad one, then stops the run or counts.

    The step itself (`training.state`) changes no parameter when its loss or a gradient is not
    finite. Batches are kept in `WORKDIR/nonfinite/step_STEP.npz`: arrays as the step read them
    (bfloat16 as float32) and `ids`, the names of the examples. The run's last checkpoint and the
    batches after it lead to the very same step again, since resuming is exact.

    Args:
      workdir: Folder of the run.
      action: `stop` at the first bad step, or `skip` it.
      limit: How many may be skipped in a whole run.
      skipped: How many were skipped before a resumed run was stopped.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        action: Literal["stop", "skip"] = "stop",
        limit: int = 100,
        skipped: int = 0,
    ):
        self.folder = workdir / "nonfinite"
        self.action, self.limit, self.skipped = action, limit, skipped

    def check(
        self,
        step: int,
        metrics: Mapping[str, float],
        ids: Sequence[str],
        batch: Mapping[str, np.ndarray],
    ) -> bool:
        """Whether the step was finite.

        Args:
          step: Number of the step, counted from 1.
          metrics: Of the step, with `finite`, `loss` and `grad_norm`.
          ids: Names of the examples that this process read for it.
          batch: Their arrays.

        Raises:
          UserError: It was not, and the run has to stop.
        """
        if metrics["finite"] == 1.0:
            return True
        self.skipped += 1
        path = self._keep(step, ids, batch)
        names = ", ".join(printable(name, 60) for name in ids[:8]) + ", ..." * (len(ids) > 8)
        what = (
            f"step {step} is not finite (loss {metrics['loss']:.4g}, norm of the gradients "
            f"{metrics['grad_norm']:.4g}); its batch ({names}) is kept in {path}"
        )
        if self.action == "stop":
            raise UserError(
                f"{what}; lower --optim.lr, look at the data, or go on with --on-nonfinite=skip"
            )
        if self.skipped > self.limit:
            raise UserError(
                f"{what}; this is number {self.skipped} of them, --max-nonfinite is {self.limit}"
            )
        return False

    def _keep(self, step: int, ids: Sequence[str], batch: Mapping[str, np.ndarray]) -> pathlib.Path:
        """Every process keeps the rows that it read."""
        process = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self.folder / f"step_{step:06d}{process}.npz"
        try:
            self.folder.mkdir(exist_ok=True)
            with atomic_path(path) as temporary:
                arrays: dict[str, Any] = {name: _plain(array) for name, array in batch.items()}
                np.savez(temporary, ids=np.asarray(ids, dtype=str), **arrays)
        except (OSError, UserError) as error:  # the step is worth more than the file
            return pathlib.Path(f"no file, since {error}")
        return path


def finite_only(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics without infinities and NaN, which JSON has no words for."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _plain(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
