"""What the files of this repository import, read without importing them."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def python_files(*folders, root=ROOT):
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def imports(path, root=ROOT):
    """Every module that a file imports, absolute, also inside functions and for types alone."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def arrows(*folders, root=ROOT):
    """Module -> modules of the same folders that it imports, both by their dotted names."""
    modules = {_dotted(path.relative_to(root)): path for path in python_files(*folders, root=root)}

    def found(name):
        while name and name not in modules:  # a function or class: the module that holds it
            name = name.rpartition(".")[0]
        return name

    return {
        module: {found(name) for name in imports(path, root)} - {"", module}
        for module, path in modules.items()
    }


def _dotted(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")
