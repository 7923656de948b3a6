"""Notebooks as pages of the site and as .ipynb files.

    python docs/notebook_pages.py --out build/notebooks [--repository owner/name]

They are kept as plain Python in jupytext's percent format. With a repository each gets a badge that
opens it on Colab, from the branch `notebooks` of that repository, and a first cell that clones it
there.
"""

import argparse
import os
import pathlib

import jupytext
import nbformat

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
BRANCH = "notebooks"  # where the .ipynb files lie
COLAB = "https://colab.research.google.com"
SETUP = """\
# On Colab: fetch the code and install it. Elsewhere nothing happens.
import os, pathlib, shutil, sys

if "google.colab" in sys.modules and not pathlib.Path("pyproject.toml").exists():
    !git clone --quiet --depth 1 https://github.com/{at} checkout
    os.chdir("checkout")
    extra = "[cuda]" if shutil.which("nvidia-smi") else ""
    !{{sys.executable}} -m pip install --quiet --editable ".{{extra}}"
    sys.path.insert(0, os.getcwd())"""


def name_of(repository):
    """owner/name of an address on GitHub, or as it is."""
    return repository.removeprefix("https://github.com/").rstrip("/")


def address(path, repository):
    """Where Colab opens a notebook."""
    return f"{COLAB}/github/{repository}/blob/{BRANCH}/{path.stem}.ipynb"


def read(path, repository=""):
    """A notebook of `notebooks/`, with badge and first cell where a repository is named."""
    notebook = jupytext.read(path)
    if repository:
        title, _, text = notebook.cells[0].source.partition("\n")
        badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({address(path, repository)})"
        notebook.cells[0].source = f"{title}\n\n{badge}\n{text}"
        notebook.cells.insert(1, nbformat.v4.new_code_cell(SETUP.format(at=repository)))
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # and not drawn anew each time
    return notebook


def page(path, repository=""):
    """Markdown of a notebook: its code, and what is said of it."""
    notebook, parts = jupytext.read(path), []
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        else:
            parts.append(f"```python\n{cell.source}\n```")
        if i == 0 and repository:  # without the picture of the badge, which is on Colab's server
            parts.append(f"[Open in Colab]({address(path, repository)})")
    return "\n\n".join(parts) + "\n"


def parser(repository):
    """The class that Sphinx reads `notebooks/*.py` with."""
    from myst_parser.parsers.sphinx_ import MystParser

    class NotebookParser(MystParser):
        supported = ("notebook",)

        def parse(self, inputstring, document):
            super().parse(page(pathlib.Path(document["source"]), repository), document)

    return NotebookParser


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=pathlib.Path, required=True, help="folder for .ipynb files")
    options.add_argument(
        "--repository",
        default=os.environ.get("REPOSITORY", ""),
        help="owner/name or address on GitHub",
    )
    args = options.parse_args()
    repository = name_of(args.repository)
    args.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(FOLDER.glob("*.py")):
        nbformat.write(read(path, repository), args.out / f"{path.stem}.ipynb")
        print(args.out / f"{path.stem}.ipynb")


if __name__ == "__main__":
    main()
