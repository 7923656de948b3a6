"""The notebooks: plain files that run from the first cell to the last, as users run them."""

import ast
import itertools
import os
import re
import runpy
import shlex
import subprocess

import documented
import jupytext
import nbclient
import nbformat
import pytest
from source_tree import ROOT

PATHS = sorted((ROOT / "notebooks").glob("*.py"))
NAMES = ["compare_samplers", "official_weights", "quickstart", "train_on_your_clips"]


def execute(name, folder):
    """Runs a notebook in an empty folder, with short settings, and gives it with its outputs."""
    notebook = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    where = {"metadata": {"path": str(folder)}}
    settings = {
        "DICODE_FAST": "1",
        "DICODE_CHECKOUT": str(ROOT),
        "DICODE_CHECK_SHAPES": "0",
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # half of the time is the compiler's
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }
    client = nbclient.NotebookClient(notebook, timeout=3000, kernel_name="python3", resources=where)
    client.execute(env=os.environ | settings)
    return notebook


def outputs(notebook, kind):
    """What its cells have shown, of one kind of data, or printed (`stdout`, `stderr`)."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == kind:
                found.append(output.text)
            elif kind in output.get("data", {}):
                found.append(output.data[kind])
    return found


def videos(notebook):
    return "".join(outputs(notebook, "text/html")).count("<video")


def test_all_notebooks_are_known():
    assert [path.stem for path in PATHS] == NAMES
    others = {path.suffix for path in (ROOT / "notebooks").iterdir()} - {".py"}
    assert not others - {""}  # caches of Python and Jupyter


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_notebook_is_a_plain_file_that_says_what_each_cell_does(path):
    text = path.read_text()
    notebook = jupytext.reads(text, fmt="py:percent")
    body = lambda written: written.split("# ---\n", 2)[2]  # noqa: E731  the head names versions
    assert body(jupytext.writes(notebook, fmt="py:percent")) == body(text)
    assert notebook.metadata.kernelspec.name == "python3"
    for before, cell in itertools.pairwise(notebook.cells):
        if cell.cell_type == "code":
            assert not cell.outputs
            ast.parse(cell.source)  # no magic: the file runs as a program too
            assert before.cell_type == "markdown", f"nothing is said of: {cell.source[:60]}"
    assert not re.search(r"[\"'`\s](/[a-z]+/|[A-Z]:\\|~/)", text)
    for command in re.findall(r"^# (python -m .*)", text.replace("\\\n#", " "), re.MULTILINE):
        documented.check(command)


@pytest.mark.slow
def test_quickstart_shows_its_videos(tmp_path):
    notebook = execute("quickstart", tmp_path)
    assert videos(notebook) == 4  # of two cells with one, and one with two
    assert "float32" in outputs(notebook, "text/plain")[0]
    assert "(32, 64)" in outputs(notebook, "text/plain")
    assert outputs(notebook, "image/png")
    assert (tmp_path / "circle.mp4").stat().st_size > 1000


@pytest.mark.slow
def test_samplers_are_compared(tmp_path):
    notebook = execute("compare_samplers", tmp_path)
    assert re.search(r"dpm\+\+, 2 steps +[\d.]+ s +[\d.]+ dB", "".join(outputs(notebook, "stdout")))
    assert videos(notebook) == 1


@pytest.mark.slow
def test_a_stand_in_for_official_weights_goes_there_and_back(tmp_path):
    notebook = execute("official_weights", tmp_path)
    said = "".join(outputs(notebook, "stdout"))
    assert "converting a small stand-in of random weights" in said
    same, count = re.search(r"(\d+) of (\d+) tensors are as they were", said).groups()
    assert same == count > "1"
    assert videos(notebook) == 1


@pytest.mark.long
@pytest.mark.slow
def test_a_system_is_trained_on_drawn_clips(tmp_path):
    notebook = execute("train_on_your_clips", tmp_path)
    assert (tmp_path / "models/clips/config.json").exists()
    assert videos(notebook) == 1


def test_the_training_is_that_of_the_documentation(tmp_path, monkeypatch):
    """`test_docs.py` runs the commands of the page."""
    ran = []

    class Process:
        stdout, returncode = (), 0

        def __init__(self, words, **_):
            command = f"python {shlex.join(words[1:])}".replace(
                "python -m dicode_jax.cli", "dicode"
            )
            ran.append(command.replace(f"{ROOT}/", ""))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DICODE_CHECKOUT", str(ROOT))
    monkeypatch.setattr(subprocess, "Popen", Process)
    text = (ROOT / "notebooks/train_on_your_clips.py").read_text()
    text = text[: text.index("pipe = dicode_jax.load(")]
    exec(compile(text, "train_on_your_clips.py", "exec"), {})
    page = (ROOT / "docs/training.md").read_text().split("## A few videos of your own")[1]
    told = [line.split() for line in page.replace("VIDEOS", "videos").splitlines()]
    assert [command.split()[:3] for command in ran if " -m train." in command] == [
        ["python", "-m", f"train.{name}"]
        for name in ("autoencoder", "tokenizer", "tokenizer", "ar")
    ]
    monkeypatch.chdir(ROOT)
    for command in ran:
        documented.check(command)
        assert " metrics " in command or " inspect " in command or command.split() in told


@pytest.mark.parametrize("repository", ["", "someone/clips"])
def test_ipynb_files_have_a_badge_where_the_repository_is_known(tmp_path, monkeypatch, repository):
    where = f"https://github.com/{repository}/" if repository else ""
    argv = ["notebook_pages.py", "--out", str(tmp_path), "--repository", where]
    monkeypatch.setattr("sys.argv", argv)
    runpy.run_path(str(ROOT / "docs/notebook_pages.py"), run_name="__main__")
    made = sorted(tmp_path.glob("*.ipynb"))
    assert [path.stem for path in made] == NAMES
    for path in made:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        opens = f"colab.research.google.com/github/{repository}/blob/notebooks/{path.name}"
        assert (opens in notebook.cells[0].source) == bool(repository)
        clones = (
            f"!git clone --quiet --depth 1 https://github.com/{repository} " in path.read_text()
        )
        assert clones == bool(repository)
        assert not any(cell.get("outputs") for cell in notebook.cells)
