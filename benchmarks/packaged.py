"""How long `dicode generate` takes with the packaged model, from the start of the process.

    python -m benchmarks.packaged --rounds 3 --json

Three commands: one clip, a minute of video, and that minute until its first clip can be played. The
first start of each compiles into a folder of its own and is told apart; the medians are of later
ones. Load of the machine before and after is in the report: where it is above the cores, repeat.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from dicode_jax.storage.files import part_of

PROMPT = "a red circle moves right on a black background"
MINUTE = 30  # clips of two seconds
POLL = 0.01  # seconds


class Run(NamedTuple):
    """A process that is over.

    Attributes:
      seconds: From its start to its end.
      first_clip: To the first clip in a file; None if there was none.
      peak_bytes: Of its resident memory.
    """

    seconds: float
    first_clip: float | None
    peak_bytes: int


def run(command: Sequence[str], part: pathlib.Path, env: dict[str, str]) -> Run:
    """Runs a command that writes the clips of a video into `part` first.

    Raises:
      SystemExit: It failed; the message is its last line.
    """
    start, first, peak = time.perf_counter(), None, 0
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as p:
        memory = pathlib.Path(f"/proc/{p.pid}/status")
        while p.poll() is None:
            # Of all that it ever had, so that what is read last is the peak.
            held = [line for line in memory.read_text().splitlines() if line.startswith("VmHWM")]
            peak = int(held[0].split()[1]) << 10 if held else peak
            if first is None and part.exists():
                first = time.perf_counter() - start
            time.sleep(POLL)
        seconds = time.perf_counter() - start
        said = p.stderr.read().decode().strip() if p.stderr else ""
    if p.returncode:
        raise SystemExit(f"error: {' '.join(command)}: {said.splitlines()[-1:] or p.returncode}")
    return Run(seconds, first, peak)


def generate(num_clips: int, programs: str | os.PathLike, *options: str) -> Run:
    """Runs `dicode generate` with compiled programs in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "out.mp4"
        command = [sys.executable, "-m", "dicode_jax.cli", "generate", PROMPT, "--out", str(out)]
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(programs)}
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # as without the folder's name
        command += ["--num-clips", str(num_clips), *options]
        return run(command, pathlib.Path(part_of(out)), env)


def machine() -> dict:
    """What the numbers depend on besides the program."""
    return {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}


def measure(rounds: int, *options: str) -> dict:
    """Seconds of the first start and medians of later ones."""
    before = machine()
    with tempfile.TemporaryDirectory() as programs:
        cold = {count: generate(count, programs, *options) for count in (1, MINUTE)}
        warm = [
            {count: generate(count, programs, *options) for count in (1, MINUTE)}
            for _ in range(rounds)
        ]
    first = [runs[MINUTE].first_clip or 0.0 for runs in warm]
    return {
        "options": list(options),
        "first_start": {"one clip": cold[1].seconds, "a minute": cold[MINUTE].seconds},
        "median": {
            "a minute's first clip": statistics.median(first),
            "one clip": statistics.median(runs[1].seconds for runs in warm),
            "a minute": statistics.median(runs[MINUTE].seconds for runs in warm),
        },
        "rounds": rounds,
        "before": before,
        "after": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="starts after the first")
    parser.add_argument("--quality", default="standard", help="as of dicode generate")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report = measure(args.rounds, "--quality", args.quality)
    if args.json:
        print(json.dumps(report))
        return
    for what, seconds in report["median"].items():
        print(f"{what:<24} {seconds:6.1f} s")
    for what, seconds in report["first_start"].items():
        print(f"{what + ', first start':<24} {seconds:6.1f} s")
    print(f"cores and load before and after: {report['before']}, {report['after']}")


if __name__ == "__main__":
    main()
