"""Plants one small fault at a time and counts how many of them the tests notice.

python -m scripts.mutation_trial --out outputs/mutants.jsonl [--count 120] [--seed 0] [--whole]

Each is planted in a copy of the tree, never in the tree itself; docs/testing.md says more. Own
code, since mutmut calls functions through wrappers, which neither jit's static arguments nor
jaxtyping see through, and cosmic-ray runs one command for all files, not the tests next to each.
"""

import argparse
import fnmatch
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile

from scripts.mutants import Mutant, mutants_of

ROOT = pathlib.Path(__file__).parents[1]

# Where faults are planted. The nearest tests of room/file.py are room/test_file.py, or these, or
# else all of the room.
FILES = """pipelines/* models/dicode/generate* models/dicode/decoder* models/dicode/ar.py
    models/dicode/tokenizer* diffusion/* training/optim* training/state* training/setup*
    media/transforms* media/resize* text/* stages/dicode/packing* stages/dicode/examples*
    stages/dicode/language_model* stages/dicode/tokenizer_loss* data/encoded_cache*"""
NEAREST = {
    "pipelines/base.py": "pipelines/test_load.py storage/test_hub.py pipelines/test_dicode.py",
    "pipelines/divot.py": "pipelines/test_load.py convert/test_divot.py",
    "pipelines/dynamicrafter.py": "pipelines/test_load.py pipelines/test_dynamicrafter.py",
    "models/dicode/ar.py": "models/dicode/test_ar.py models/dicode/test_packed.py",
    "diffusion/samplers/base.py": "diffusion/samplers",
    "diffusion/guidance.py": "diffusion/test_guidance.py diffusion/test_guided.py",
    "media/resize.py": "media/test_transforms.py data/test_clips.py",
    "stages/dicode/language_model.py": "train/test_ar.py stages/dicode/test_stages.py",
    "data/encoded_cache.py": "data/test_encoded_cache.py train/test_cache.py",
}
# What `--whole` runs on those that the nearest tests let through.
WIDER = """parity pipelines stages models/dicode diffusion data training text media storage
    train/test_ar.py train/test_cache.py train/test_data.py train/test_loop.py cli/test_main.py"""

PYTEST = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]


def draw(root: pathlib.Path, count: int, seed: int) -> list[Mutant]:
    """As many faults as `count`, of all files in turn; the same ones for the same tree."""
    rng = random.Random(seed)
    paths = sorted((root / "dicode_jax").rglob("*.py"))
    names = [path.relative_to(root).as_posix() for path in paths]
    patterns = [f"dicode_jax/{pattern}" for pattern in FILES.split()]
    chosen = [name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)]
    piles = filter(None, (mutants_of(name, (root / name).read_text()) for name in chosen))
    piles = [rng.sample(pile, len(pile)) for pile in piles]
    rng.shuffle(piles)
    return list(filter(None, itertools.chain(*itertools.zip_longest(*piles))))[:count]


def nearest(path: str) -> str:
    """Tests next to a file of the library, below tests/."""
    name = path.removeprefix("dicode_jax/")
    room, _, file = name.rpartition("/")
    own = f"{room}/test_{file}"
    return NEAREST.get(name, own if (ROOT / "tests" / own).exists() else room)


def trial(tree: pathlib.Path, mutant: Mutant, tests: str, limit: float) -> tuple[str | None, str]:
    """What noticed a fault in `tree`, a test or the time limit, or None; and what pytest said."""
    env = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # a file may change twice within its clock's tick
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{tree}-jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, *PYTEST, *(f"tests/{test}" for test in tests.split())]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    path = tree / mutant.path
    text = path.read_bytes()
    path.write_bytes(mutant.plant(text))
    child = subprocess.Popen(command, cwd=tree, env=env, start_new_session=True, **output)
    try:
        said = child.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        return f"time limit of {limit:g} s", ""
    finally:
        path.write_bytes(text)
        if child.poll() is None:  # it hangs, or this is interrupted
            os.killpg(child.pid, signal.SIGKILL)  # pytest and all that it started
            child.wait()
    if child.returncode in (4, 5):  # wrong usage, no tests: no verdict on the fault
        raise RuntimeError(f"pytest could not run {tests}:\n{said}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    noticed = failed[1] if failed else f"pytest's exit status {child.returncode}"
    return (noticed if child.returncode else None), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON lines; goes on there")
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds; a hang is noticed")
    parser.add_argument("--only", type=int, help="repeat this one, and show what pytest says")
    parser.add_argument("--whole", action="store_true", help="wider tests on those that survived")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what has been started ends with it
    mutants, survivors, known = draw(ROOT, args.count, args.seed), 0, {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, args.out.open("a+") as file:
        file.seek(0)
        for entry in map(json.loads, file if args.only is None else ()):
            known[entry["fault"], entry["tests"]] = entry["killed"]
        tree = pathlib.Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "outputs", "runs"))
        for number in range(len(mutants)) if args.only is None else [args.only]:
            mutant, killed = mutants[number], None
            for tests in [nearest(mutant.path)] + [WIDER] * args.whole:
                key = (str(mutant), tests)
                if killed is None and key not in known:
                    known[key], said = trial(tree, mutant, tests, args.limit)
                    entry = {"fault": str(mutant), "tests": tests, "killed": known[key]}
                    print(json.dumps(entry), file=file, flush=True)
                    print(said if args.only is not None else "", end="")
                killed = killed or known.get(key)
            survivors += killed is None
            verdict = f"killed by {killed}" if killed else "SURVIVED"
            print(f"{number:3d}  {mutant}  {verdict}", flush=True)
    if args.only is None:
        print(f"{len(mutants) - survivors} of {len(mutants)} killed")


if __name__ == "__main__":
    main()
