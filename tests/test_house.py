"""Which room of the house may know which: arrows run down only, and nowhere in a circle.

An import counts wherever it stands: inside a function or under `TYPE_CHECKING` it is as much of an
arrow as at the top of a file.
"""

import graphlib
import re

import pytest
from source_tree import ROOT, arrows

OUTER = ("benchmarks", "scripts", "train", "convert", "configs")
LIBRARY = "dicode_jax"

# From the top floor down: a room imports from the rows below its own alone. The longest name that
# fits a module is its room; docs/architecture.md shows the same rows.
FLOORS = (
    ("benchmarks", "scripts"),
    ("train",),
    ("convert", "configs"),
    ("cli",),
    ("app",),
    ("__init__",),
    ("stages",),
    ("pipelines",),
    ("evaluation",),
    ("models", "data"),
    ("media", "text", "training", "storage"),
    ("diffusion",),
    ("nn", "distributions"),
    ("runtime",),
    ("config",),
    ("storage.files",),  # whatever writes a file writes it whole, a config too
    ("errors", "kinds", "typing", "_begun", "_moved", "assets"),
)

# The cli and what lies outside the library may know every family; inside, only these do.
FAMILIES = ("dicode", "dynamicrafter", "divot", "landiff", "ar_diffusion")
KNOWS_FAMILIES = {
    "dicode_jax": "names the public pipelines",
    "dicode_jax.stages.registry": "finds the stage that a config describes",
    "dicode_jax.stages.export": "writes out a run of any stage",
}


def room(module):
    """The longest entry of the table that fits, without `dicode_jax.`."""
    name = "__init__" if module == LIBRARY else module.removeprefix(f"{LIBRARY}.")
    rooms = [known for row in FLOORS for known in row if f"{name}.".startswith(f"{known}.")]
    assert rooms, f"{module} has no room: give it a row in FLOORS and in docs/architecture.md"
    return max(rooms, key=len)


def row(module):
    """Number of the module's row, counted from the top."""
    return next(n for n, rooms in enumerate(FLOORS) if room(module) in rooms)


def family(module):
    """The family that a module of the library belongs to, or None if it is shared."""
    parts = module.split(".")
    name = parts[2].removesuffix("_programs") if parts[0] == LIBRARY and parts[2:] else None
    return name if name in FAMILIES else None


def upward(known):
    """The arrows that do not run down."""
    return [
        f"{source} imports {target}"
        for source, targets in known.items()
        for target in sorted(targets)
        if room(source) != room(target) and row(source) >= row(target)
    ]


def between_families(known):
    """The arrows from one family to another, or from shared code to a family."""
    return [
        f"{source} imports {target}"
        for source, targets in known.items()
        if source.startswith(LIBRARY) and room(source) != "cli" and source not in KNOWS_FAMILIES
        for target in sorted(targets)
        if family(target) not in (None, family(source))
    ]


def circle(known):
    """One circle of modules, or None."""
    try:
        graphlib.TopologicalSorter(known).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_arrows_run_down_only():
    assert not upward(arrows(LIBRARY, *OUTER))


def test_families_do_not_know_each_other_nor_does_shared_code_know_them():
    assert not between_families(arrows(LIBRARY))


def test_no_modules_import_each_other_in_a_circle():
    assert circle(arrows(LIBRARY, "train", "convert", "configs")) is None


def test_every_family_is_known_and_every_exception_is_needed():
    known = arrows(LIBRARY)
    homes = [home for name in ("models", "stages") for home in (ROOT / LIBRARY / name).iterdir()]
    assert {home.name for home in homes if (home / "__init__.py").exists()} <= set(FAMILIES)
    idle = [name for name in KNOWS_FAMILIES if not any(map(family, known[name]))]
    assert not idle


@pytest.mark.parametrize(
    ("source", "line", "wrong"),
    [
        ("nn/norm.py", "from dicode_jax.models import gpt2", upward),
        ("nn/norm.py", "def f():\n    import dicode_jax.models.gpt2", upward),
        ("nn/norm.py", "if TYPE_CHECKING:\n    from dicode_jax.models.gpt2 import GPT2", upward),
        ("data/clips.py", "from dicode_jax.models.gpt2 import GPT2", upward),  # the same row
        ("pipelines/dicode.py", "from dicode_jax import stages", upward),
        ("config.py", "from dicode_jax.storage.hub import find", upward),
        ("pipelines/divot.py", "from dicode_jax.pipelines import dicode", between_families),
        ("models/clip.py", "from dicode_jax.models.dicode.ar import DiCoDeLM", between_families),
        ("models/gpt2.py", "def f():\n    from dicode_jax.models import clip", circle),
    ],
)
def test_an_arrow_that_may_not_be_is_found(source, line, wrong, tmp_path):
    names = "models/gpt2 models/dicode/ar pipelines/dicode stages/__init__ storage/hub models/clip"
    for name in names.split():
        (tmp_path / LIBRARY / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / LIBRARY / f"{name}.py").touch()
    (tmp_path / LIBRARY / "models/clip.py").write_text("from dicode_jax.models import gpt2\n")
    assert not wrong(arrows(LIBRARY, root=tmp_path))
    (tmp_path / LIBRARY / source).parent.mkdir(exist_ok=True)
    (tmp_path / LIBRARY / source).write_text(line)
    assert wrong(arrows(LIBRARY, root=tmp_path))


def test_the_architecture_page_shows_the_same_rows():
    page = (ROOT / "docs/architecture.md").read_text()
    section = page.split("## Who does what")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    shown = [re.findall(r"`([\w/]+?)(?:/|\.py)?`", cell) for cell in cells]
    shown = [[name.replace("/", ".") for name in names] for names in shown]
    hidden = {"_begun", "_moved", "assets"}  # a time, old names, and files
    assert [set(rooms) for rooms in shown] == [set(rooms) - hidden for rooms in FLOORS]
