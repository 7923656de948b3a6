"""The documentation site: all pages are in it, links lead somewhere, docstrings can be read.

`make docs` builds it, with warnings as errors; this is what can be said without building.
"""

import importlib.util
import re
import xml.etree.ElementTree

import pytest
from documented import PAGES
from source_tree import ROOT

HIDDEN = {"__init__", "_begun", "_moved", "app", "assets", "cli"}  # no API: --help tells of these
PICTURES = sorted((ROOT / "docs/images").glob("*.svg"))
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)")


def module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


docstrings = module("docstrings")


def listed():
    """The files of all toctrees."""
    for page in ("index", "notebooks"):
        text = (ROOT / f"docs/{page}.md").read_text()
        for block in re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL):
            for line in block.splitlines():
                if line and not line.startswith(":"):
                    place = ROOT / "docs" / (re.search(r"<(.+)>", line) or ["", line])[1]
                    yield place.resolve().relative_to(ROOT).as_posix()


def anchors(path):
    """Headings of a page as GitHub names them, repeated ones with a number."""
    found = []
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        repeated = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", one) is not None for one in found)
        found.append(f"{name}-{repeated}" if repeated else name)
    return found


def test_every_page_is_in_the_site_once():
    pages = {path.relative_to(ROOT).as_posix() for path in PAGES}
    pages |= {"CHANGELOG.md"} | {f"notebooks/{p.name}" for p in ROOT.glob("notebooks/*.py")}
    pages |= {f"docs/api/{path.name}" for path in (ROOT / "docs/api").glob("*.rst")}
    pages = {page.rpartition(".")[0] for page in pages - {"docs/index.md"}}
    assert sorted(listed()) == sorted(pages)


def test_every_module_of_the_library_is_in_the_api_once():
    pages = [path.read_text() for path in (ROOT / "docs/api").glob("*.rst")]
    packages = " ".join(re.findall(r"^\.\. modules:: (.+)$", "\n".join(pages), re.MULTILINE))
    shown = [name for one in packages.split() for name in docstrings.modules(ROOT, one)]
    library = ROOT / "dicode_jax"
    files = [path.relative_to(library).with_suffix("") for path in library.rglob("*.py")]
    names = {".".join(path.parts) for path in files if not HIDDEN & set(path.parts)}
    assert sorted(shown) == sorted(names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", page.read_text())
    for target, anchor in LINK.findall(text):
        if re.match(r"https?:|mailto:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        assert path.is_file(), (
            f"{page.name} links to a folder, {target}, which is no page of the site"
        )
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}#{anchor}"


def test_links_are_found_and_anchors_named():
    found = [link for page in PAGES for link in LINK.findall(page.read_text())]
    assert len(found) > 60
    assert ("docs/conversion.md", "disk-and-memory") in found
    assert "disk-and-memory" in anchors(ROOT / "docs/conversion.md")


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_drawing_says_what_it_shows_and_needs_nothing_else(path):
    drawing = xml.etree.ElementTree.parse(path).getroot()
    tags = [node.tag.rpartition("}")[2] for node in drawing.iter()]
    assert tags.count("title") == tags.count("desc") == 1
    assert tags.count("text") > 15
    text = path.read_text()
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"href|url\((?!#)|@import|@font-face", text)


def test_there_is_a_drawing_of_each_family_on_its_page():
    assert [path.stem for path in PICTURES] == ["ar_diffusion", "dicode", "landiff"]
    for page, name in (("architecture", "dicode"), ("ar_diffusion",) * 2, ("landiff",) * 2):
        assert f"(images/{name}.svg)" in (ROOT / f"docs/{page}.md").read_text()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("frames `[f, h, w, 3]` in 0..255", "frames ``[f, h, w, 3]`` in 0..255"),
        ("``import jax`` stays", "``import jax`` stays"),
        ("`x`s and 2`x`", r"``x``\ s and 2\ ``x``"),
        ("`a\nb` c", "``a b`` c"),
        ("2**32 - 1, *args, x_ and a_b", r"2\*\*32 - 1, \*args, x\_ and a_b"),
        (
            "Loads:\n\n    a = b_*c\n\n    d\n\nEnd *x",
            "Loads:\n\n::\n\n    a = b_*c\n\n    d\n\nEnd \\*x",
        ),
        ("Args:\n  x: A\n    b.\n  y: C.", "Args:\n  x: A\n    b.\n  y: C."),
        ("Args:\n  x, y: A\n    b.\n  z: C.", "Args:\n  x: A\n    b.\n  y: A\n    b.\n  z: C."),
    ],
)
def test_docstrings_become_restructured_text(written, read):
    assert docstrings.convert(written) == read
