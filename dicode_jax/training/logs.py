"""Metrics of a run: one JSON object per logged step, and the same numbers for TensorBoard."""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

from dicode_jax.errors import UserError


class MetricsLog:
    """Appends to `WORKDIR/metrics.jsonl` and to event files in `WORKDIR/tensorboard`.

    Numbers keep their full precision. Lines of a run that was stopped and resumed follow each
    other; a step that was done twice appears twice, and the later line counts.

    Raises:
      UserError: The folder cannot be written.
    """

    def __init__(self, workdir: pathlib.Path):
        from tensorboardX import SummaryWriter

        try:
            self._file = (workdir / "metrics.jsonl").open("a")
        except OSError as error:
            raise UserError(f"cannot write to {workdir}: {error.strerror}") from error
        self._board = SummaryWriter(str(workdir / "tensorboard"))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs one step; every value is a number."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Shows an image [h, w, 3] uint8 in TensorBoard."""
        self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes both."""
        self._file.close()
        self._board.close()


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
