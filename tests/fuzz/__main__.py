"""Tries mutants of every door for some minutes; exit status 1 when one did not end well."""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from fuzz.doors import DOORS
from fuzz.trial import make_mutant, try_door


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="in all (10)")
    parser.add_argument("--door", choices=sorted(DOORS), action="append", help="only this one")
    parser.add_argument("--seed", type=int, default=None, help="of the mutants (the time)")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant (0)")
    parser.add_argument("--count", type=int, help="mutants of each door instead of minutes")
    parser.add_argument("--keep", metavar="DIR", help="copy those that do not end well to DIR")
    args = parser.parse_args()
    seed = int(time.time()) if args.seed is None else args.seed
    doors = args.door or list(DOORS)
    print(f"seed {seed}\n{'door':<16}{'mutants':>9}{'results':>9}{'refused':>9}{'faults':>9}")
    end, found, tried = time.monotonic() + 60 * args.minutes, [], 0
    for i, name in enumerate(doors):
        now = time.monotonic()
        until = None if args.count else now + (end - now) / (len(doors) - i)
        outcomes, faults = try_door(
            name, seed=seed, first=args.first, count=args.count, until=until
        )
        count, found = outcomes.total() + len(faults), found + faults
        tried += count
        numbers = (count, outcomes["result"], outcomes["refused"], len(faults))
        print(f"{name:<16}" + "".join(f"{x:>9}" for x in numbers), flush=True)
    print(f"{'in all':<16}{tried:>9}{'':>18}{len(found):>9}")
    for fault in found:
        print(f"\n--- {fault.door}, seed {seed}, mutant {fault.number}\n{fault.what}")
        if args.keep:
            _keep(pathlib.Path(args.keep), fault, seed)
    return 1 if found else 0


def _keep(folder: pathlib.Path, fault, seed: int) -> None:
    door, to = DOORS[fault.door], folder / f"{fault.door}-{seed}-{fault.number}"
    valid = folder / f"valid-{fault.door}"
    if not valid.exists():
        valid.mkdir(parents=True)
        door.build(valid)
    if not to.exists():
        make_mutant(door, valid, to, seed, fault.number)


if __name__ == "__main__":
    sys.exit(main())
