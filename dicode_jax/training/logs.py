"""Metrics of a run: one JSON object per logged step, and the same numbers for TensorBoard."""

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from dicode_jax.errors import UserError
from dicode_jax.training.nonfinite import finite_only

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """Appends to `WORKDIR/metrics.jsonl` and to event files in `WORKDIR/tensorboard`.

    Numbers keep their full precision; infinities and NaN are left out. Lines of a run that was
    stopped and resumed follow each other; a step that was done twice appears twice, and the later
    line counts. A line that a kill cut in half is ended, so that the next one stands by itself.

    Args:
      workdir: Folder of the run.
      first_step: The step that a resumed run does first; TensorBoard then hides what an earlier
        run wrote from there on.
      wandb_project: Also log to this project of Weights & Biases, always to the same run of it.
      config: What Weights & Biases shows as the run's settings.

    Raises:
      UserError: The folder cannot be written, or wandb is not installed.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        first_step: int = 1,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self._workdir = workdir
        self._wandb = None
        if wandb_project is not None:
            self._wandb = _start_wandb(workdir, wandb_project, config or {})
        path = workdir / "metrics.jsonl"
        try:
            is_torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
            self._file = path.open("a")
            if is_torn:
                self._file.write("\n")
            self._board = _summary_writer()(
                str(workdir / "tensorboard"),
                purge_step=first_step if first_step > 1 else None,
                flush_secs=10,
            )
        except OSError as error:
            raise UserError(f"cannot write to {workdir}: {error.strerror}") from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs one step; every value is a number.

        Raises:
          UserError: The disk does not take it.
        """
        metrics = finite_only(metrics)
        try:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write to {self._workdir / 'metrics.jsonl'}: {error.strerror}"
            ) from error
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def close(self) -> None:
        """Flushes all."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: str | pathlib.Path) -> list[dict]:
    """Lines of a `metrics.jsonl` by step; of a step that was logged twice the later line."""
    by_step = {}
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # a line that a kill cut in half
            continue
        by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def _summary_writer() -> type:
    """TensorboardX's writer; without torch, which it would import wherever it is installed.

    That takes seconds and loads torch's CUDA libraries beside those of JAX.
    """
    is_hidden = "torch" not in sys.modules
    if is_hidden:
        sys.modules["torch"] = None  # an import of it then fails, as if it were not there
    try:
        from tensorboardX import SummaryWriter
    finally:
        if is_hidden:
            del sys.modules["torch"]
    return SummaryWriter


def _start_wandb(workdir: pathlib.Path, project: str, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs wandb: pip install 'dicode-jax[wandb]'") from None
    path = workdir / "wandb_id.txt"
    if not path.is_file():
        path.write_text(wandb.util.generate_id())
    return wandb.init(
        project=project,
        id=path.read_text().strip(),
        name=workdir.name,
        dir=str(workdir),
        config=dict(config),
        resume="allow",
    )
