"""Who knows whom in `convert`: systems stand on parts, parts on the engine, nothing on itself."""

import ast
import graphlib
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
FAMILIES = ("dicode", "dynamicrafter", "divot", "landiff", "ar_diffusion")


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted((ROOT / "convert").rglob("*.py"))}


def imports(path):
    """Modules of `convert` that a file imports, inside functions and with `importlib` too."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif "importlib" in text and isinstance(node, ast.Constant):
            yield str(node.value).split(":")[0]


GRAPH = {
    name: {other for other in imports(path) if other in MODULES and other != name}
    for name, path in MODULES.items()
}


def room(name):
    return name.split(".")[1] if "." in name else ""


def test_no_import_comes_back_to_where_it_started():
    graphlib.TopologicalSorter(GRAPH).prepare()


def test_the_engine_knows_no_part_and_parts_no_system():
    below = {"engine": {"engine"}, "parts": {"engine", "parts"}}
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if room(other) not in below.get(room(name), {room(other)})
    ]
    assert not wrong, "\n".join(wrong)
    rooms = {room(name) for name in GRAPH}
    assert set(below) <= rooms
    assert set(FAMILIES) & rooms, "the names of the families have changed"


def test_families_do_not_know_each_other():
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if {room(name), room(other)} <= set(FAMILIES) and room(name) != room(other)
    ]
    assert not wrong, "\n".join(wrong)
