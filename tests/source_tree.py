"""Read the package's source for the tests of its architecture: files, modules, functions and lines of code."""

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "tinyllava"
FILES = sorted(PACKAGE.rglob("*.py"))
PARTS = ("connectors", "vision_towers", "llms", "templates", "tuning")
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


class Function(NamedTuple):
    """A function or method where it is defined. `nested`: inside another function."""

    path: Path
    node: ast.FunctionDef | ast.AsyncFunctionDef
    nested: bool

    def __str__(self) -> str:
        return f"{name_file(self.path)}:{self.node.lineno} {self.node.name}"


def name_file(path: Path) -> str:
    """The path of a file relative to the package: `data/encode.py`."""
    return path.relative_to(PACKAGE).as_posix()


def name_module(path: Path) -> str:
    """`tinyllava.data.encode` of data/encode.py, `tinyllava.data` of data/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("tinyllava", *parts)).removesuffix(".__init__")


@cache
def parse_file(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def find_functions(path: Path) -> Iterator[Function]:
    """All functions and methods of a file."""
    stack: list[tuple[ast.AST, bool]] = [(parse_file(path), False)]
    while stack:
        parent, nested = stack.pop()
        is_function = isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function:
            yield Function(path, parent, nested)
        stack += [(child, nested or is_function) for child in ast.iter_child_nodes(parent)]


def count_code_lines(path: Path) -> int:
    """Lines that are not blank, comment or docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(parse_file(path)):
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node, clean=False) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in NOT_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)
