"""Kills trainings at random moments, many times, and compares what they do with unbroken runs.

    python -m benchmarks.kill_test --kills 100 --seed 0

Every run is a tiny model whose steps take milliseconds, in processes of their own that are sent
SIGKILL: before their first step, between steps, and while a checkpoint is being written; with one
process and with two. Metrics, batches (names and bytes), last states and exported weights must be
bitwise those of a run that was left alone. Prints one line per run and the sums.
"""

import argparse
import pathlib
import shutil
import sys
import tempfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import kills

OPTIONS = ["--checkpoint-every", "5", "--num-steps", "120"]
MOMENTS = ("start", "step", "later", "save")
KILLS_PER_RUN = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of runs of one process")
    parser.add_argument("--kills-of-two", type=int, default=16, help="of runs of two processes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="kill_test_"))
    launch = kills.Launcher(folder)
    failed = 0
    for processes, wanted in ((1, args.kills), (2, args.kills_of_two)):
        unbroken = folder / f"unbroken_{processes}"
        assert kills.finish_all(launch.start_many(unbroken, processes, *OPTIONS)) == [0] * processes
        total, run = kills.Counts(), 0
        while total.kills < wanted:
            rng = np.random.default_rng((args.seed, processes, run))
            plan = [
                str(moment) for moment in rng.choice(MOMENTS, KILLS_PER_RUN, p=(0.1, 0.2, 0.4, 0.3))
            ]
            workdir = folder / f"killed_{processes}_{run}"
            counts = kills.run_with_kills(
                launch, workdir, OPTIONS, kills=plan, seed=run, processes=processes
            )
            wrong = kills.differences(unbroken, workdir)
            print(
                f"{processes} process(es), run {run}: {counts}, differences: {wrong or 'none'}",
                flush=True,
            )
            failed += bool(wrong)
            total, run = total + counts, run + 1
            if not wrong:
                shutil.rmtree(workdir)
        print(
            f"{processes} process(es), {run} runs: {total}; runs that differ: {failed}", flush=True
        )
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
