"""What CI runs: which Python it finds, and what it says at the end."""

import fnmatch
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / ".ci"
GOOD = "===== 7 passed in 1.00s ====="
BAD = "== 1 failed, 6 passed in 61.00s (0:01:01) =="


@pytest.fixture(scope="module")
def newest_python():
    spec = importlib.util.spec_from_file_location("newest_python", FOLDER / "newest_python.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)


def interpreter(path, version, *, starts=True):
    said = f"echo {version.replace('.', ' ')} {path}"
    script(path, said if starts else "exit 1")


@pytest.fixture
def versions(tmp_path, monkeypatch):
    """Interpreters on PATH and, as version managers keep them, beside 3.11.7."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    interpreter(tmp_path / "bin/python3.12", "3.12.9")
    interpreter(tmp_path / "bin/python3.30", "3.30.0", starts=False)
    for version in ("2.7.18", "3.9.1", "3.11.7", "3.11.9", "3.13.2", "3.13.10"):
        interpreter(tmp_path / "versions" / version / "bin/python3", version)
    interpreter(tmp_path / "versions/3.31.0/bin/python3", "3.31.0", starts=False)
    (tmp_path / "versions/readme").touch()
    return tmp_path / "versions"


def test_newest_python_is_found_on_path_or_beside_the_running_one(newest_python, versions):
    newest = newest_python.newest(versions / "3.11.7", (3, 11))
    assert newest == str(versions / "3.13.10/bin/python3")
    alone = versions / "none" / "3.11.7"
    assert newest_python.newest(alone, (3, 11)) == str(versions.parent / "bin/python3.12")


def test_no_python_is_newer_than_the_newest(newest_python, versions):
    assert newest_python.newest(versions / "3.13.10", (3, 13)) is None


def test_only_a_python_that_makes_environments_counts(newest_python, tmp_path):
    pytest.importorskip("ensurepip")
    assert newest_python.probe(sys.executable)[0] == sys.version_info[:3]
    interpreter(tmp_path / "python3", "", starts=False)
    assert newest_python.probe(str(tmp_path / "python3")) is None
    assert newest_python.probe(str(tmp_path / "missing")) is None


@pytest.mark.parametrize(
    ("tests", "newer", "others", "status", "end"),
    [
        ((GOOD, 0), (GOOD, 0), 0, 0, [GOOD, GOOD]),
        ((GOOD, 0), None, 0, 0, [GOOD]),
        ((BAD, 2), (GOOD, 0), 0, 1, ["failed: make test VENV=.venv TORCH=*", BAD, GOOD]),
        ((GOOD, 0), (BAD, 2), 0, 1, ["failed: make demo quick PYTHON=/new/python3 *", GOOD, BAD]),
        ((GOOD, 0), ("the demo fails", 2), 0, 1, ["failed: make demo quick *", GOOD]),
        ((GOOD, 0), None, 2, 1, ["failed: make gate docs dist test-app VENV=.venv", GOOD]),
    ],
)
def test_a_failure_of_any_part_is_the_status_and_the_end(
    tmp_path, tests, newer, others, status, end
):
    shutil.copytree(FOLDER, tmp_path / ".ci")
    script(tmp_path / ".venv/bin/python", "echo /new/python3" if newer else "echo")
    answers = {"test": tests, "demo": newer or ("not to be called", 2), "gate": ("built", others)}
    script(
        tmp_path / "bin/make",
        *(
            f"[ $2 = {key} ] && echo '{said}' && exit {code}"
            for key, (said, code) in answers.items()
        ),
    )
    done = subprocess.run(
        ["bash", str(tmp_path / ".ci/run")],
        env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    lines = done.stdout.splitlines()[-len(end) - 1 :]
    assert lines[0] == ""
    assert all(fnmatch.fnmatch(line, wanted) for line, wanted in zip(lines[1:], end, strict=True))
