"""Prints the newest Python that is newer than the one that runs this, or nothing.

Looked for on PATH (`python3.14` and so on) and beside the installation of the running one, where
version managers keep the others. What does not start or makes no environments does not count.
"""

import pathlib
import shutil
import subprocess
import sys

PROBE = """
import ensurepip, sys, venv
assert sys.version_info.releaselevel == "final"
print(*sys.version_info[:3], sys.executable)
"""


def candidates(prefix: pathlib.Path) -> list[str]:
    """Whatever may be an interpreter; `prefix` is the folder that one is installed in."""
    on_path = [shutil.which(f"python3.{minor}") for minor in range(40)]
    beside = [str(path) for path in sorted(prefix.parent.glob("*/bin/python3"))]
    return [path for path in on_path if path] + beside


def probe(python: str) -> tuple[tuple[int, ...], str] | None:
    """Version and path of an interpreter that works, else None."""
    try:
        done = subprocess.run(
            [python, "-I", "-c", PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    *version, path = done.stdout.strip().split(" ", 3)
    return tuple(map(int, version)), path


def newest(prefix: pathlib.Path, current: tuple[int, int]) -> str | None:
    """Path of the newest one of a later minor version than `current`."""
    working = filter(None, map(probe, candidates(prefix)))
    later = [(version, path) for version, path in working if version[:2] > current]
    return max(later)[1] if later else None


if __name__ == "__main__":
    print(newest(pathlib.Path(sys.base_prefix), sys.version_info[:2]) or "")
