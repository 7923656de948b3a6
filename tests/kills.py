"""Trainings in processes of their own, which are killed and started again."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tiny_training

from dicode_jax import config as config_lib
from dicode_jax.training.checkpoint import find_checkpoints
from dicode_jax.training.logs import read_metrics

UNFINISHED = "*.orbax-checkpoint-tmp*"
TINY = tiny_training.TinyConfig()


@dataclasses.dataclass
class Counts:
    """What happened to a run: kills in all, those that left an unfinished save, and so on."""

    kills: int = 0
    in_save: int = 0
    before_first_checkpoint: int = 0
    steps_done_twice: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*(a + b for a, b in pairs))


class Launcher:
    """Starts command lines in children that have imported everything before they begin.

    Args:
      folder: For config and runs.
      config: Of the training.
      main: Its command line, `arguments -> exit status`, which children import.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        config: Any = TINY,
        main: Callable[[list[str]], int] = tiny_training.main,
    ):
        self.folder, self.main = folder, main
        self.config = write_config(folder, config)
        # Children find what earlier ones compiled: the same program, bit for bit.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["PYTHONPATH"] = os.pathsep.join(
            str(path) for path in (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent)
        )
        self._context = multiprocessing.get_context("forkserver")
        # One server for all launchers. tensorboardX is slow to import when torch is there.
        preload = ["kills", "dicode_jax.stages.registry", "tensorboardX"]
        self._context.set_forkserver_preload(preload)

    def start(self, workdir: pathlib.Path, *options: str, process: int = 0):
        """Starts a run; its output goes to `WORKDIR_PROCESS.log`."""
        workdir.mkdir(exist_ok=True)
        argv = ["--config", str(self.config), "--workdir", str(workdir), "--log-every", "1"]
        log = f"{workdir}_{process}.log"
        child = self._context.Process(target=_run, args=(self.main, [*argv, *options], log))
        child.start()
        return child

    def start_many(self, workdir: pathlib.Path, count: int, *options: str) -> list:
        """Starts a run of several processes, which find each other on loopback."""
        if count == 1:
            return [self.start(workdir, *options)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        where = ("--coordinator", f"localhost:{port}", "--num-processes", str(count))
        return [
            self.start(workdir, *options, *where, "--process-id", str(i), process=i)
            for i in range(count)
        ]


def write_config(folder: pathlib.Path, config: Any) -> pathlib.Path:
    """A config file for a command line."""
    config_lib.to_json(config, folder / "settings.json")
    kind, path = type(config), folder / "config.py"
    path.write_text(
        f"from dicode_jax.config import from_json\n"
        f"from {kind.__module__} import {kind.__name__}\n\n\n"
        f"def get_config():\n"
        f"    return from_json({kind.__name__}, {str(folder / 'settings.json')!r})\n"
    )
    return path


def _run(main: Callable[[list[str]], int], argv: list[str], log: str) -> None:
    """Body of a process started by `multiprocessing`: the command line, with output to a file."""
    os.setpgid(0, 0)  # so that a signal can go to it and its workers
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # multiprocessing's children ignore it
    sys.exit(main(argv))


def finish(process, timeout: float = 120) -> int:
    """Waits for the exit status."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError("the run did not end")
    return process.exitcode


def finish_all(processes, timeout: float = 120) -> list[int]:
    """Exit statuses of several processes."""
    return [finish(process, timeout) for process in processes]


def wait_for(condition, process, timeout: float = 120) -> bool:
    """Waits until the condition holds; False when the process ended before."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return True
        if process.exitcode is not None:
            return False
        time.sleep(0.002)
    raise TimeoutError("waited in vain")


def children(pid: int) -> list[int]:
    """Processes that the threads of a process have started (Linux)."""
    lists = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


def wait_for_end_of_group(group: int, timeout: float = 20) -> bool:
    """Whether all processes of a group end by themselves."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    return False


def count_lines(path: pathlib.Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def unfinished(workdir: pathlib.Path) -> list[pathlib.Path]:
    return list((workdir / "checkpoints").glob(UNFINISHED))


def whole(workdir: pathlib.Path) -> list[int]:
    return find_checkpoints(workdir / "checkpoints")


def run_with_kills(
    launch: Launcher,
    workdir: pathlib.Path,
    options: list[str],
    *,
    kills: list[str],
    seed: int,
    processes: int = 1,
) -> Counts:
    """A run that is killed again and again, and then left to its end.

    Args:
      kills: The moment of each kill. `start`: anywhere in the first second, `step`: after some
        steps, `later`: some steps after a checkpoint became whole, `save`: while one is written,
        `next save`: the same when there is a whole one.
      processes: Of the run; they are killed in random order, within 30 ms.
    """
    rng = np.random.default_rng(seed)
    counts = Counts()
    metrics = workdir / "metrics.jsonl"
    for kill in kills:
        before = (set(unfinished(workdir)), whole(workdir))
        started = launch.start_many(workdir, processes, *options)
        reached = True
        if kill == "start":
            time.sleep(rng.uniform(0, 1.0))
        if kill in ("save", "next save"):

            def saves(old=before[0], least=int(kill == "next save")):
                return len(whole(workdir)) >= least and set(unfinished(workdir)) - old

            reached = wait_for(saves, started[0])
            time.sleep(rng.uniform(0, 0.02))
        if kill == "later":
            reached = wait_for(lambda old=before[1]: whole(workdir) != old, started[0])
        if kill in ("step", "later"):
            lines = count_lines(metrics) + int(rng.integers(1, 9))
            reached = reached and wait_for(lambda n=lines: count_lines(metrics) >= n, started[0])
            time.sleep(rng.uniform(0, 0.01))
        for i in rng.permutation(processes):
            os.kill(started[i].pid, signal.SIGKILL)
            time.sleep(rng.uniform(0, 0.03) if processes > 1 else 0)
        killed = [status == -signal.SIGKILL for status in finish_all(started)]
        if not any(killed) or not reached:
            break  # it had come to its end before
        counts.kills += 1
        counts.in_save += bool(unfinished(workdir))
        counts.before_first_checkpoint += not whole(workdir)
    statuses = finish_all(launch.start_many(workdir, processes, *options))
    assert statuses == [0] * processes, pathlib.Path(f"{workdir}_0.log").read_text()[-2000:]
    counts.steps_done_twice = count_lines(metrics) - len(read_metrics(metrics))
    return counts


def differences(unbroken: pathlib.Path, killed: pathlib.Path) -> list[str]:
    """What is not bitwise the same: metrics of steps, batches, the last state, exported files."""
    out = []
    wanted = {record["step"]: record for record in read_metrics(unbroken / "metrics.jsonl")}
    steps = set()
    for record in _lines(killed / "metrics.jsonl"):  # steps done twice too
        steps.add(record["step"])
        other = wanted[record["step"]]
        names = {name for name in {*record, *other} if not name.endswith("_per_second")}
        for name in sorted(names):
            if record.get(name) != other.get(name):
                out.append(f"{name} of step {record['step']}")
    if steps != set(wanted):
        out.append(f"steps {sorted(steps ^ set(wanted))}")
    for path in sorted(unbroken.glob("batches_*.jsonl")):
        batches = {record["batch"]: record for record in _lines(path)}
        read = _lines(killed / path.name)
        out += [f"batch {r['batch']}" for r in read if r != batches.get(r["batch"], r)]
    for what, read in (("state", _state), ("model", _model)):
        one, two = read(unbroken), read(killed)
        assert one
        out += [f"{what} {name}" for name in sorted({*one, *two}) if one.get(name) != two.get(name)]
    return out


def _state(workdir: pathlib.Path) -> dict[str, bytes]:
    """The arrays of the last checkpoint, and its place in the data."""
    folder = workdir / "checkpoints" / str(whole(workdir)[-1])
    with ocp.PyTreeCheckpointer() as reader:
        arrays = reader.metadata(folder / "state").item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), arrays)
        held = reader.restore(folder / "state", ocp.args.PyTreeRestore(restore_args=plain))
    leaves = jax.tree_util.tree_leaves_with_path(held)
    read = {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves}
    return read | {"place in the data": (folder / "data/metadata").read_bytes()}


def _model(workdir: pathlib.Path) -> dict[str, bytes]:
    """The exported files."""
    files = [path for path in (workdir / "model").rglob("*") if path.is_file()]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in files}


def _lines(path: pathlib.Path) -> list[dict]:
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # cut by a kill
            continue
    return records
