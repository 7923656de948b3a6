"""Compiles small forms of the programs for a GPU and compares what they move with what they may.

    python -m benchmarks.check_budgets
    python -m benchmarks.check_budgets --update

`budgets.json` holds, for each, the bytes of a step when they were last looked at; 3 % more is a
fault, as are a convolution in float32 and a weight that a loop converts or copies in every turn.
"""

import argparse
import json
import pathlib
import sys

from benchmarks import aot_gpu

FILE = pathlib.Path(__file__).with_name("budgets.json")
MORE = 1.03  # of the recorded bytes
FORBIDDEN = ("float32_convolutions", "conversions_per_step", "copies_per_step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="record what is moved now")
    args = parser.parse_args()
    aot_gpu.prepare_environment()
    budgets = json.loads(FILE.read_text())
    wrong = []
    for name, budget in budgets.items():
        options = {**budget["program"], "config": pathlib.Path(budget["program"]["config"])}
        report = aot_gpu.measure(**options)
        found = faults(name, report, budget)
        print("\n".join(found) or f"{name}: {report['bytes_per_step'] / 1e9:.3f} GB a step, fine")
        wrong += found
        budget["bytes_per_step"] = round(report["bytes_per_step"])
        budget["allowed"] = {key: report[key] for key in FORBIDDEN if report[key]}
    if args.update:
        FILE.write_text(json.dumps(budgets, indent=2) + "\n")
        return 0
    return 1 if wrong else 0


def faults(name: str, report: dict, budget: dict) -> list[str]:
    """What a program does that its budget does not allow, a line each."""
    allowed = budget.get("allowed", {})
    lines = [
        f"{name}: {report[key]} {key.replace('_', ' ')}, {allowed.get(key, 0)} allowed"
        for key in FORBIDDEN
        if report[key] > allowed.get(key, 0)
    ]
    now, before = report["bytes_per_step"], budget["bytes_per_step"]
    if now > MORE * before:
        lines.append(f"{name}: {now / 1e9:.3f} GB a step, {before / 1e9:.3f} when last recorded")
    return lines


if __name__ == "__main__":
    sys.exit(main())
