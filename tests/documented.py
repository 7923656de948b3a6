"""The commands and Python snippets that the documentation shows, and whether they could run.

Here nothing is run (`documented_runs` does): of a command its own parser reads the arguments, for
trainings the fields of their config too, and is stopped there.
"""

import argparse
import ast
import contextlib
import importlib
import io
import os
import re
import shlex
import sys
import types
import unittest.mock

import yaml
from source_tree import ROOT, python_files

from dicode_jax.runtime import distributed
from train import command as command_lib

PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "dicode_jax/assets").glob("*/README.md")),
)
COMMAND = r"(?:\bpython(?: -m|(?= scripts/))|(?<![\w./=-])dicode|(?<![\w./-])make) "
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


class Wrong(Exception):
    """A command or snippet that cannot run as it is written."""


class _Stop(BaseException):
    """Everything has been parsed; carries what came out."""


def commands():
    """`(where, command, is_whole)` of every page and docstring, each command once there.

    What is named within a sentence need not be whole: `dicode metrics` without its folder.
    """
    found = {}
    for page in PAGES:
        place = page.name if page.parent in (ROOT, ROOT / "docs") else str(page.relative_to(ROOT))
        for command, is_whole in _of_page(page.read_text(encoding="utf-8")):
            found.setdefault((place, command), is_whole)
    for path in python_files("configs", "train", "convert"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for command in re.findall(rf"^ *({COMMAND}.*)", text.replace("\\\n", " "), re.MULTILINE):
            found.setdefault((str(path.relative_to(ROOT)), command), True)
    return [(where, command, is_whole) for (where, command), is_whole in found.items()]


def _of_page(text):
    for language, block in FENCE.findall(text):
        if language == "yaml":
            yield from ((" ".join(words), True) for words in _of_yaml(yaml.safe_load(block)))
        elif language == "sh":
            lines = block.replace("\\\n", " ").splitlines()
            yield from ((m[0], True) for line in lines if (m := re.search(COMMAND + ".*", line)))
    for command in re.findall(rf"`({COMMAND}[^`]+)`", FENCE.sub("", text)):
        yield command.replace("\n", " "), False


def _of_yaml(node):
    """Command and arguments of every container of a manifest."""
    if isinstance(node, list):
        for item in node:
            yield from _of_yaml(item)
    elif isinstance(node, dict):
        if "command" in node:
            yield node["command"] + node.get("args", [])
        yield from _of_yaml(list(node.values()))


def words_of(command):
    """The words of one command: without comments, pipes, and what a shell would fill in."""
    command = re.sub(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+", "1", command)
    command = re.sub(r"[\[\]]", "", command)  # around what may be left out
    if command.count('"') % 2 or command.count("'") % 2:  # it stands inside a quoted one
        command = re.sub(r"""["'][^"']*$""", "", command)
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = []
    for word in lexer:
        if set(word) <= set("();<>|&"):
            break
        words.append(word)
    return words


def check(command, *, is_whole=True):
    """What the parser makes of a command.

    Raises:
      Wrong: It refuses it, an option is spelled with underscores, or there is no such program.
    """
    words = words_of(command)
    odd = [word for word in words if re.match(r"--[\w.-]*_", word.partition("=")[0])]
    if odd:
        raise Wrong(f"{odd[0]}: options are written with dashes")
    if words[0] == "make":
        return _check_make(words[1:])
    module, args = program(words)
    if module == "convert" and args[:1] == ["NAME"]:  # of any conversion
        args = ["dicode", *args[1:]]
    path = ROOT / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        raise Wrong(f"there is no {module}")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            with _parsers_only(is_whole), unittest.mock.patch("sys.argv", [module, *args]):
                execute(path)
        except _Stop as stop:
            return stop.args[0]
        except SystemExit as end:
            if not end.code and (not args or "--help" in args):  # it tells what there is
                return words
    raise Wrong(f"{command}\n{said.getvalue()}")


def program(words):
    """The module that a command runs, and its arguments."""
    if words[0] == "dicode":
        return "dicode_jax.cli", words[1:]
    if words[1] != "-m":
        return words[1].removesuffix(".py"), words[2:]
    return words[2], words[3:]


def execute(path):
    """Runs a file as `python -m` would."""
    main, ours = types.ModuleType("__main__"), sys.modules["__main__"]
    main.__file__ = str(path)
    sys.modules["__main__"] = main  # where its dataclasses look for names
    try:
        exec(compile(path.read_text(encoding="utf-8"), path, "exec"), vars(main))
    finally:
        sys.modules["__main__"] = ours


def _check_make(words):
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_set, _ = word.partition("=")
        line = rf"^{name} *\?=" if is_set else rf"^{name}:"
        if not re.search(line, makefile, re.MULTILINE):
            raise Wrong(f"the Makefile has no {name}")
    return words


@contextlib.contextmanager
def _parsers_only(is_whole):
    """Stops every program as soon as its arguments have been parsed."""
    parser, parse_training = argparse.ArgumentParser, command_lib.parse
    parse_args, parse_known_args = parser.parse_args, parser.parse_known_args

    def stop_after(function):
        def parse(*args, **kwargs):
            raise _Stop(function(*args, **kwargs))

        return parse

    def training(args, *more, **kwargs):
        args = sys.argv[1:] if args is None else args
        if is_whole or "--config" in args:
            raise _Stop(parse_training(args, *more, **kwargs))
        known = io.StringIO()  # a training without its config: options of either kind
        for option in ("--help", "--help-config"):
            with contextlib.redirect_stdout(known), contextlib.suppress(SystemExit):
                parse_training([option], *more, **kwargs)
        for word in args:
            if word.startswith("--") and f"{word.partition('=')[0]} " not in known.getvalue():
                raise SystemExit(f"there is no option {word}")
        raise _Stop(None)

    def known(self, args=None, namespace=None):
        if not is_whole:
            for action in self._actions:
                action.required = False
        parsed, unknown = parse_known_args(self, args, namespace)
        return parsed, unknown

    patch = unittest.mock.patch.object
    with (
        patch(parser, "parse_args", stop_after(parse_args)),
        patch(parser, "parse_known_args", known),
        patch(command_lib, "parse", training),
        patch(distributed, "initialize", lambda *_, **__: False),
        patch(sys, "path", list(sys.path)),
        unittest.mock.patch.dict(os.environ),
    ):
        yield


def snippets():
    """`(where, code)` of every Python block."""
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                yield page.name, block


def check_snippet(code):
    """Compiles a snippet and resolves what it imports.

    Raises:
      Wrong: It does not compile, a name that it imports does not exist, or it does not use one.
    """
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise Wrong(str(error)) from error
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                _resolve(getattr(node, "module", None), alias.name)
                if (alias.asname or alias.name.partition(".")[0]) not in used:
                    raise Wrong(f"{alias.name} is imported and not used")


def _resolve(module, name):
    try:
        if module is None:
            importlib.import_module(name)
        elif not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")
    except ImportError as error:
        raise Wrong(str(error)) from error
