"""Metrics of a run: one JSON object per logged step, and the same numbers for TensorBoard."""

import contextlib
import errno
import json
import os
import pathlib
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from dicode_jax.errors import UserError, printable
from dicode_jax.storage.files import MAX_TEXT, atomic_path, parse_json, read_small
from dicode_jax.training.nonfinite import finite_only

__all__ = ["MetricsLog", "read_log", "read_metrics"]

MAX_NAMES = 100  # of the numbers in a log, each of which has a column and a diagram
MAX_STEP = 2**53  # up to here a diagram tells steps apart


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
        with self._errors():
            self._file = os.fdopen(_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a")
            with open(path, "rb") as file:
                file.seek(max(0, self._file.tell() - 1))
                is_torn = file.read() not in (b"", b"\n")
            if is_torn:
                self._file.write("\n")
            (workdir / "tensorboard").mkdir(exist_ok=True)
            self._board = _EventFile(workdir / "tensorboard", first_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs one step; every value is a number.

        Raises:
          UserError: The disk does not take it.
        """
        metrics = finite_only(metrics)
        with self._errors():
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
            self._board.write(step, metrics)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def close(self) -> None:
        """Flushes all; what a full disk does not take is lost."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()
        if self._wandb is not None:
            self._wandb.finish()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write the logs in {self._workdir}: {error.strerror or error}"
            ) from error


def read_metrics(path: str | pathlib.Path) -> list[dict]:
    """Lines of a `metrics.jsonl` by step; of a step that was logged twice the later line.

    Raises:
      UserError: It is no file, or cannot be read.
    """
    return read_log(path)[0]


def read_log(path: str | pathlib.Path) -> tuple[list[dict], int]:
    """`read_metrics`, and how many lines were passed over, since they are no step's.

    A kill cuts a line in half; what others wrote may be anything. A record has its whole `step` and
    numbers under names that are lines. Of one file they have `MAX_NAMES`: lines with further ones
    are passed over too.

    Raises:
      UserError: It is no file, or cannot be read.
    """
    by_step, names, passed_over = {}, set(), 0
    try:
        with open(path, "rb", opener=_regular) as file:
            for line in _lines(file):
                record = _record(line) if line.strip() else {}
                if record is None or len(names | record.keys()) > MAX_NAMES:
                    passed_over += 1
                elif record:
                    names |= record.keys()
                    by_step[record["step"]] = record
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return [by_step[step] for step in sorted(by_step)], passed_over


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, with a dash in place of one that is too long to be kept."""
    while line := file.readline(MAX_TEXT):
        is_whole = len(line) < MAX_TEXT or line.endswith(b"\n")
        while not line.endswith(b"\n") and (rest := file.readline(MAX_TEXT)):
            line, is_whole = rest, False
        yield line if is_whole else b"-"


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = parse_json(line.decode(errors="replace"), "a line")
    except UserError:
        return None
    if not isinstance(found, dict) or len(found) > MAX_NAMES:
        return None
    numbers = {printable(name, 60): x for name, x in found.items() if type(x) in (int, float)}
    step = numbers.get("step")
    return numbers if isinstance(step, int) and 0 <= step <= MAX_STEP else None


def _regular(name: str | os.PathLike, flags: int) -> int:
    """Opens no pipe or device, which may never be ready, and for writing no link."""
    no_link = os.O_NOFOLLOW if flags & os.O_WRONLY else 0
    file = os.open(name, flags | no_link | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, f"{name} is no file")
    return file


class _EventFile:
    """What TensorBoard reads, written at once.

    tensorboardX's own writer leaves it to a thread; when that fails on a full disk, the next calls
    wait for it for ever.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        board = _import_tensorboard_x()
        self._event, self._summary = board.proto.event_pb2.Event, board.proto.summary_pb2.Summary
        self._writer = board.event_file_writer.EventsWriter(
            str(folder / "events"), filename_suffix=f".{first_step}"
        )
        start = board.proto.event_pb2.SessionLog(status=board.proto.event_pb2.SessionLog.START)
        self._writer.write_event(self._event(step=first_step, session_log=start))
        self._flushed = 0.0

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=x) for name, x in metrics.items()]
        now = time.time()
        event = self._event(step=step, wall_time=now, summary=self._summary(value=values))
        self._writer.write_event(event)
        if now - self._flushed > 10:
            self._writer.flush()
            self._flushed = now

    def close(self) -> None:
        self._writer.close()


def _import_tensorboard_x() -> Any:
    """TensorboardX without torch, which it would import wherever it is installed.

    That takes seconds and loads torch's CUDA libraries beside those of JAX.
    """
    is_hidden = "torch" not in sys.modules
    if is_hidden:
        # An import of it then fails, as if it were not there.
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        import tensorboardX
    finally:
        if is_hidden:
            del sys.modules["torch"]
    return tensorboardX


def _start_wandb(workdir: pathlib.Path, project: str, config: Mapping[str, Any]) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--wandb needs wandb: pip install 'dicode-jax[wandb]'") from None
    path = workdir / "wandb_id.txt"
    if not os.path.isfile(path):
        with atomic_path(path) as temporary:
            temporary.write_text(wandb.util.generate_id())
    return wandb.init(
        project=project,
        id=read_small(path).decode(errors="replace").strip(),
        name=workdir.name,
        dir=str(workdir),
        config=dict(config),
        resume="allow",
    )
