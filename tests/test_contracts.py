"""The code in a contract's docstring parses, and the parts have its methods with its arguments."""

import ast
import re
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest

from tests.source_tree import PACKAGE, parse_file

CONTRACTS = ("connectors", "vision_towers", "llms", "tuning", "data/sources", "eval/benchmarks")
SIGNATURE = re.compile(
    r"(?P<indent> *)(?P<call>(?!def|class)[a-z_]\w*\([^()]*\))"  # name(arguments)
    r"(?P<returns> -> \w[\w.]*(?:\[[^\]]*\])?(?: \| \w+)?)?(?=\s*(?:#|$)|\s{2,})"  # -> type, then a comment or the end
)


def read_blocks(contract: str) -> list[str]:
    """The indented blocks of a contract's docstring, without their indentation."""
    text = ast.get_docstring(parse_file(PACKAGE / contract / "__init__.py"))
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("    "):
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [textwrap.dedent("\n".join(block)) for block in blocks if block]


def parse_block(block: str) -> ast.Module | None:
    """Parse the definitions of a block: Python stubs, or signatures such as `read(path: str) -> Source`.

    Returns None for any other block, such as an example of a recipe.
    """
    lines = []
    for line in block.splitlines():
        bare = SIGNATURE.match(line)
        lines.append(f"{bare['indent']}def {bare['call']}{bare['returns'] or ''}: ..." if bare else line)
    if not any(line.lstrip().startswith(("class ", "def ")) for line in lines):
        return None
    return ast.parse("\n".join(lines))


def list_arguments(function: ast.FunctionDef) -> list[str]:
    """Names of a function's arguments, without `self`, `*args` and `**kwargs`."""
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def find_parts(contract: str) -> list[Path]:
    return [path for path in sorted((PACKAGE / contract).glob("*.py")) if not path.stem.startswith("_")]


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_contract_is_kept_by_its_parts(contract: str) -> None:
    definitions: dict[str, list[list[str]]] = defaultdict(list)
    attributes: set[str] = set()
    for path in find_parts(contract):
        for node in ast.walk(parse_file(path)):
            if isinstance(node, ast.FunctionDef):
                definitions[node.name].append(list_arguments(node))
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                attributes |= {target.id for target in targets if isinstance(target, ast.Name)}
    promised = [node for block in read_blocks(contract) if (tree := parse_block(block)) for node in ast.walk(tree)]
    functions = [node for node in promised if isinstance(node, ast.FunctionDef)]
    assert functions, f"tinyllava/{contract}/__init__.py shows no signature in its docstring"
    for function in functions:
        expected = list_arguments(function)
        fitting = [names for names in definitions[function.name] if names[: len(expected)] == expected]
        assert fitting, f"no file of {contract}/ has {function.name}({', '.join(expected)}), which the contract shows"
    for node in promised:
        if isinstance(node, ast.AnnAssign):
            assert node.target.id in attributes, (
                f"no file of {contract}/ has {node.target.id}, which the contract shows"
            )


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_part_defines_what_the_contract_shows_for_every_one(contract: str) -> None:
    """Every part must define the first class of a contract, except for what is called optional."""
    block = next((block for block in read_blocks(contract) if block.startswith("class ")), None)
    if block is None:  # modules of functions
        return
    (shown,) = parse_block(block).body
    lines = block.splitlines()  # one for each line of what is parsed
    functions = [node for node in shown.body if isinstance(node, ast.FunctionDef)]
    required = {node.name for node in functions if "optional" not in lines[node.end_lineno - 1]}
    for path in find_parts(contract):
        classes = [node for node in parse_file(path).body if isinstance(node, ast.ClassDef)]
        methods = {node.name for each in classes for node in each.body if isinstance(node, ast.FunctionDef)}
        inherits = any(
            each.name == shown.name and any(ast.unparse(base) != "nn.Module" for base in each.bases) for each in classes
        )
        assert inherits or required <= methods, f"{path.name} has no {', '.join(sorted(required - methods))}"
