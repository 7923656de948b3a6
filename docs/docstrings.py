"""Docstrings as reStructuredText: they are written with Markdown's backticks and indented code."""

import re

CODE = re.compile(r"``[^`]+``|`[^`]+`")
SPECIAL = re.compile(r"[\\*|]|(?<=\w)_(?!\w)")  # what reStructuredText would read as markup
# `  height, width: Of the latents.` and the lines that go on with it.
SHARED = re.compile(
    r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+):(?P<said> .*(?:\n(?P=indent) +.*)*)", re.MULTILINE
)


def modules(root, package):
    """Names below `dicode_jax` of a package's modules, or of a single one, in order."""
    path = root / "dicode_jax" / package.replace(".", "/")
    if not path.is_dir():
        return [package]
    found = sorted(path.glob("*.py"))
    return [f"{package}.{file.stem}" for file in found if not file.stem.startswith("__")]


def process(app, what, name, obj, options, lines):
    """For `autodoc-process-docstring`: changes `lines` where they stand."""
    lines[:] = convert("\n".join(lines)).split("\n")


def convert(text):
    """Code to literals, everything else escaped, and code that is indented by four to blocks."""
    out, prose, indent, code = [], [], 0, None
    for line in SHARED.sub(_apart, text).split("\n"):
        depth = len(line) - len(line.lstrip()) if line.strip() else None
        if code is not None and (depth is None or depth >= code):
            out.append(line)
            continue
        code = None
        is_new = any(map(str.strip, prose)) and not prose[-1].strip()
        if depth is not None and is_new and depth >= indent + 4:
            out += [*_prose(prose), " " * indent + "::", "", line]
            prose, code = [], depth
        else:
            prose.append(line)
            indent = indent if depth is None else depth
    return "\n".join([*out, *_prose(prose)])


def _apart(match):
    """What is said of several arguments or attributes at once, of each."""
    names, said = match["names"].split(", "), match["said"]
    return "\n".join(f"{match['indent']}{name}:{said}" for name in names)


def _prose(lines):
    text, parts, end = "\n".join(lines), [], 0
    for match in CODE.finditer(text):
        parts.append(_escape(text[end : match.start()]))
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        inner = re.sub(r"\s+", " ", match[0].strip("`"))
        parts += ["\\ " * before.isalnum(), f"``{inner}``", "\\ " * after.isalnum()]
        end = match.end()
    return "".join([*parts, _escape(text[end:])]).split("\n") if lines else []


def _escape(text):
    return SPECIAL.sub(lambda match: "\\" + match[0], text)
