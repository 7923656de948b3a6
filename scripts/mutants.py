"""Small faults of a file: one sign, number, switch or argument that is another.

Nothing is changed in annotations, decorators, docstrings and other text, or where an error is
raised. A keyword argument is taken out whether it has a default or not.
"""

import ast
import re
from typing import NamedTuple

SWAPS = {
    "<": ["<=", ">"], "<=": ["<", ">="], ">": [">=", "<"], ">=": [">", "<="], "==": ["!="],
    "!=": ["=="], "is": ["is not"], "is not": ["is"], "in": ["not in"], "not in": ["in"],
    "and": ["or"], "or": ["and"], "+": ["-"], "-": ["+"], "*": ["/"], "/": ["*"], "//": ["*"],
    "%": ["*"], "**": ["*"],
}  # fmt: skip
SIGN = re.compile(rb"is not|not in|[-+*/%<>=!|&@]+|\b(?:is|in|and|or)\b")
EITHER_ORDER = {"maximum", "minimum", "max", "min", "array_equal", "isinstance"}
PARTS_LEFT_ALONE = {"annotation", "returns", "decorator_list", "ops", "op", "msg"}
MESSAGES = {"strict", "stacklevel"}  # keywords that decide on messages alone


class Mutant(NamedTuple):
    """A fault: bytes `start` to `end` of a file, `before`, become `after`."""

    path: str
    start: int
    end: int
    line: int
    before: str
    after: str

    def plant(self, text: bytes) -> bytes:
        return text[: self.start] + self.after.encode() + text[self.end :]

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}:{self.start}"
        return " ".join(f"{place}  {self.before} -> {self.after or 'nothing'}".split())


def mutants_of(path: str, text: str) -> list[Mutant]:
    """Every fault that the rules make of a file."""
    raw, found = text.encode(), set()
    lines = [0, *(match.end() for match in re.finditer(rb"\n", raw))]

    def place(node):
        start, end = lines[node.lineno - 1], lines[node.end_lineno - 1]
        return start + node.col_offset, end + node.end_col_offset

    def change(start, end, after):
        line, before = raw[:start].count(b"\n") + 1, raw[start:end].decode()
        if after != before:
            found.add(Mutant(path, start, end, line, before, after))

    def swap_sign(left, right):
        sign = SIGN.search(raw, place(left)[1], place(right)[0])
        for after in SWAPS.get(sign[0].decode(), ()):
            change(*sign.span(), after)

    def plant_at(node, is_index):
        match node:
            case ast.BinOp(left=left, right=right) if not (_is_text(left) or _is_text(right)):
                swap_sign(left, right)
            case ast.Compare(left, [_], [right]) | ast.BoolOp(values=[left, right, *_]):
                swap_sign(left, right)
            case ast.UnaryOp(ast.Not(), operand):
                change(*place(node), ast.unparse(operand))
            case ast.UnaryOp(ast.USub(), operand):
                is_last = is_index and ast.unparse(operand) == "1"
                change(*place(node), "0" if is_last else f"({ast.unparse(operand)})")
            case ast.Constant(bool(value)):
                change(*place(node), str(not value))
            case ast.Constant(int(value)):
                change(*place(node), "-1" if is_index and value == 0 else str(value + 1))
            case ast.Call(function, args, keywords):
                name = getattr(function, "attr", getattr(function, "id", ""))
                alike = len(args) > 1 and type(args[0]) is type(args[1])  # else it just crashes
                if alike and not isinstance(args[0], ast.Starred) and name not in EITHER_ORDER:
                    (start, mid), (other, end) = map(place, args[:2])
                    change(start, end, (raw[other:end] + raw[mid:other] + raw[start:mid]).decode())
                for keyword in keywords:
                    if keyword.arg and keyword.arg not in MESSAGES:
                        start, end = place(keyword)
                        change(start, re.compile(rb"(\s*,[ \t]*)?").match(raw, end).end(), "")

    def visit(node, is_index=False):
        if _is_left_alone(node):
            return
        plant_at(node, is_index)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return  # the number has changed with its sign
        for name, value in ast.iter_fields(node):
            inner = isinstance(node, ast.Subscript) and name == "slice"
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and name not in PARTS_LEFT_ALONE:
                    visit(child, inner or (is_index and isinstance(node, ast.Tuple)))

    visit(ast.parse(text))
    return sorted(found)


def _is_left_alone(node: ast.AST) -> bool:
    """Whether nothing in it is changed: messages and names."""
    match node:
        case (
            ast.Raise() | ast.JoinedStr() | ast.ImportFrom() | ast.keyword("strict" | "stacklevel")
        ):
            return True
        case ast.Assign([ast.Name("__all__")]):
            return True
    return False


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", 0), str)
