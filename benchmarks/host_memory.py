"""Peak of resident memory of `dicode generate` for a short and a long video of the packaged model.

    python -m benchmarks.host_memory --clips 5 300 --steps 2

Ten seconds and ten minutes, whose clips are painted in few steps: memory does not depend on how
many. Programs are compiled by a start that is not counted, as the compiler takes more than all of
the painting. The greatest of a few starts counts, and the peaks should be level within 5 %.
"""

import argparse
import json
import tempfile

from benchmarks.packaged import generate, machine


def measure(clips: list[int], steps: int, rounds: int) -> dict:
    """Peaks of each length, and the last over the first."""
    options = ("--steps", str(steps))
    with tempfile.TemporaryDirectory() as programs:
        generate(max(clips), programs, *options)
        runs = {
            count: [generate(count, programs, *options) for _ in range(rounds)] for count in clips
        }
    peaks = {count: [run.peak_bytes for run in of] for count, of in runs.items()}
    return {
        "steps": steps,
        "peak_bytes": peaks,
        "seconds": {count: [run.seconds for run in of] for count, of in runs.items()},
        "ratio": max(peaks[clips[-1]]) / max(peaks[clips[0]]),
        **machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, nargs="+", default=[5, 300], help="of two seconds")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps of a clip")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report = measure(args.clips, args.steps, args.rounds)
    if args.json:
        print(json.dumps(report))
        return
    for count, peaks in report["peak_bytes"].items():
        print(f"{2 * count:5d} s of video: {', '.join(f'{x / 1e6:.0f} MB' for x in peaks)}")
    print(f"long over short: {report['ratio']:.3f}; load {report['load']}, {report['cores']} cores")


if __name__ == "__main__":
    main()
