"""Runs of `tiny_training` in processes of their own, which are killed and started again."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import socket
import time

import numpy as np
import tiny_training

from dicode_jax.training.checkpoint import find_checkpoints
from dicode_jax.training.logs import read_metrics

UNFINISHED = "*.orbax-checkpoint-tmp*"


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
    """Starts command lines in children that have imported everything before they begin."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.config = tiny_training.write_config(folder)
        # Children find what earlier ones compiled: the same program, bit for bit.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["PYTHONPATH"] = os.pathsep.join(
            str(path) for path in (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent)
        )
        self._context = multiprocessing.get_context("forkserver")
        # tensorboardX is slow to import when torch is there.
        self._context.set_forkserver_preload(["tiny_training", "tensorboardX"])

    def start(self, workdir: pathlib.Path, *options: str, process: int = 0):
        """Starts a run; its output goes to `WORKDIR_PROCESS.log`."""
        workdir.mkdir(exist_ok=True)
        argv = ["--config", str(self.config), "--workdir", str(workdir), "--log-every", "1"]
        child = self._context.Process(
            target=tiny_training.run_child, args=([*argv, *options], f"{workdir}_{process}.log")
        )
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


def wait_for(condition, process, timeout: float = 60) -> bool:
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
        steps, `later`: some steps after a checkpoint became whole, `save`: while one is written.
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
        if kill == "save":
            reached = wait_for(lambda old=before[0]: set(unfinished(workdir)) - old, started[0])
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
    """What is not bitwise the same: metrics of steps, batches, the exported weights."""
    out = []
    names = ("loss", "grad_norm", "lr", "largest")
    wanted = {record["step"]: record for record in read_metrics(unbroken / "metrics.jsonl")}
    steps = set()
    for record in _lines(killed / "metrics.jsonl"):  # steps done twice too
        steps.add(record["step"])
        for name in names:
            if record[name] != wanted[record["step"]][name]:
                out.append(f"{name} of step {record['step']}")
    if steps != set(wanted):
        out.append(f"steps {sorted(steps ^ set(wanted))}")
    for path in sorted(unbroken.glob("batches_*.jsonl")):
        batches = {record["batch"]: record for record in _lines(path)}
        read = _lines(killed / path.name)
        out += [f"batch {r['batch']}" for r in read if r != batches.get(r["batch"], r)]
    with np.load(unbroken / "model/model.npz") as a, np.load(killed / "model/model.npz") as b:
        out += [f"weights {name}" for name in a if not np.array_equal(a[name], b[name])]
    return out


def _lines(path: pathlib.Path) -> list[dict]:
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # cut by a kill
            continue
    return records
