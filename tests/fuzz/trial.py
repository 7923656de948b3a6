"""Trying mutants of a door: a child reads them one by one, under limits that its parent watches.

A mutant ends well when the door gives a result or refuses in one line that a terminal can show, in
time, without much memory, and with nothing changed on the disk.
"""

import contextlib
import dataclasses
import faulthandler
import io
import json
import os
import pathlib
import re
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

from fuzz.doors import DOORS, Door

START = 120  # seconds until the valid files are read
SECONDS = 20  # of one mutant; a loaded machine takes several times what an idle one does
MEMORY = 400 << 20  # bytes that one mutant may add to what the process holds
ADDRESSES = 4 << 30  # of address space beside what is there at first
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
TESTS = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A mutant that did not end well: `what` happened, and where."""

    door: str
    number: int
    what: str


def try_door(
    name: str, *, seed: int, first: int, count: int | None = None, until: float | None = None
) -> tuple[Counter, list[Fault]]:
    """Tries mutants `first`, `first + 1` ... of a door; the same numbers give the same mutants.

    Args:
      count: How many; None for as many as there is time for.
      until: When to end, of `time.monotonic()`.

    Returns:
      How many gave a "result" and how many were "refused", and those that did neither.
    """
    outcomes, faults, number = Counter(), [], first
    end = None if count is None else first + count
    while (end is None or number < end) and (until is None or time.monotonic() < until):
        with _child(name, seed, number, end) as child:
            at, since = None, time.monotonic()
            while True:
                left = (START if at is None else SECONDS) - (time.monotonic() - since)
                line = _next_line(child, left)
                if line is None and child.poll() is None:
                    faults.append(Fault(door=name, number=number, what=_stack(child)))
                    number += 1
                    break
                if not line:
                    code = child.wait()
                    if at is None:
                        raise RuntimeError(f"the child of {name} began with none: {_tail(child)}")
                    if code != 0:
                        what = f"the process ended with {code}: {_tail(child)}"
                        faults.append(Fault(door=name, number=number, what=what))
                        number += 1
                    break
                since = time.monotonic()
                said = json.loads(line)
                at = said["number"]
                if said["outcome"] == "begin":
                    number = at
                    continue
                if said["outcome"] in ("result", "refused"):
                    outcomes[said["outcome"]] += 1
                else:
                    faults.append(Fault(door=name, number=at, what=said["outcome"]))
                number = at + 1
                if until is not None and since > until:
                    break
    return outcomes, faults


@contextlib.contextmanager
def _child(name: str, seed: int, first: int, end: int | None) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "fuzz.trial", name, str(seed), str(first), str(end or 0)]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryFile() as said,
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment | {"TMPDIR": scratch, "XDG_CACHE_HOME": f"{scratch}/cache"},
        ) as child,
    ):
        child.said = said  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield child
        finally:
            child.kill()


def _next_line(child: subprocess.Popen, seconds: float) -> bytes | None:
    """A line of the child, empty at its end; None when there is none in time."""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        if not selector.select(max(seconds, 0)):
            return None
        return child.stdout.readline()  # written in one piece


def _stack(child: subprocess.Popen) -> str:
    """Where a child hangs."""
    child.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    return f"more than {SECONDS} s: {_tail(child)}"


def _tail(child: subprocess.Popen) -> str:
    said = child.said  # pyright: ignore[reportAttributeAccessIssue]
    said.seek(0)
    return said.read().decode(errors="replace")[-1500:]


def make_mutant(door: Door, valid: pathlib.Path, to: pathlib.Path, seed: int, number: int) -> None:
    """Copies the valid files of a door and changes one of them, see `Door`."""
    rng = np.random.default_rng([seed, zlib.crc32(door.name.encode()), number])
    shutil.copytree(valid, to)
    files = sorted(path for pattern in door.files for path in to.glob(pattern))
    path = files[int(rng.integers(len(files)))]
    others = [file.read_bytes() for file in files]
    path.write_bytes(door.mutate(path.read_bytes(), others, rng))
    for file in set(files) - {path} if door.is_alone else ():
        file.unlink()


def _attempt(door: Door, folder: pathlib.Path) -> str:
    """What becomes of a mutant: "result", "refused" or what went wrong."""
    from fuzzing import tree

    from dicode_jax.errors import UserError

    before, held = tree(folder), _reset_peak()
    out = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            refusal = door.use(folder)
        outcome = "result" if refusal is None else "refused"
        text = out.getvalue() + (refusal or "")
    except UserError as error:
        outcome, text = "refused", str(error)
        if len(text.splitlines()) != 1:
            return f"a refusal of {len(text.splitlines())} lines: {text[:300]!r}"
    except BaseException:
        return traceback.format_exc()[-1500:]
    if _OBEYED.search(text):
        return f"what a terminal would obey: {text[:300]!r}"
    if len(text) > 100_000:
        return f"{len(text)} letters were printed: {text[:300]!r}"
    if tree(folder) != before:
        return "something was written"
    if (grown := _peak() - held) > MEMORY:
        return f"memory grew by {grown >> 20} MB"
    return outcome


def _status(name: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"no {name} in /proc/self/status")


def _reset_peak() -> int:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def main(name: str, seed: int, first: int, end: int | None) -> None:
    faulthandler.register(signal.SIGUSR1)
    faulthandler.enable()
    door, number = DOORS[name], first
    with tempfile.TemporaryDirectory() as scratch:
        valid = pathlib.Path(scratch, "valid")
        valid.mkdir()
        door.build(valid)
        outcome = _attempt(door, valid)  # imports and compiles what there is
        if outcome != "result":
            raise RuntimeError(f"the valid files of {name} give: {outcome}")
        limit = _status("VmSize") + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        while end is None or number < end:
            folder = pathlib.Path(scratch, "mutant")
            make_mutant(door, valid, folder, seed, number)
            _say(number, "begin")
            outcome = _attempt(door, folder)
            _say(number, outcome)
            shutil.rmtree(folder)
            number += 1


def _say(number: int, outcome: str) -> None:
    line = json.dumps({"number": number, "outcome": outcome}) + "\n"
    os.write(sys.__stdout__.fileno(), line.encode())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) or None)
