"""The size of the package and its names: `pytest -s tests/test_house.py` prints the figures.

The core is the way from a recipe to a trained model and its answers: the rooms in CORE. Only it has a limit, so that
a reader can keep it in mind. The rest are

- the ground floor: files directly in tinyllava/ that import nothing of models (GROUND in test_imports.py). The core
  uses them.
- guards: they watch the training. `train` calls them, but the training itself does not need them.
- wings: what a run can do without. They are stamps, eval, pages, commands and cli, and the files in NOT_CORE: data
  formats beside the usual ones, the download of datasets, and the reading of earlier checkpoints and their templates.

To remove a wing, remove its entry too, such as that of a data format in FORMATS.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

from tests.source_tree import FILES, PARTS, Function, count_code_lines, find_functions, name_file, parse_file

CORE_LINES, FILE_LINES, FUNCTION_LINES = 6000, 300, 50
CORE = ("config", "factory.py", *PARTS, "data", "model", "checkpoint", "train", "infer")
NOT_CORE = (
    "data/prepare/",
    "data/sources/stamps.py",
    "data/sources/tar.py",
    "checkpoint/legacy",
    "data/legacy_template.py",
)
LONG_FILES = ("llms/openelm.py",)  # one LLM's classes, which transformers does not have

# Names that every part of a kind defines, by the folder or file in which they may be repeated.
CONTRACTS = {
    "connectors/": {"Connector"},
    "vision_towers/": {"VisionTower"},
    "llms/": {"LLM"},
    "tuning/": {"Tuning"},
    "__init__.py": {"load"},  # `tinyllava.load` gives a Session, `checkpoint.load` its VLM
    "data/sources/": {"matches", "read", "to_sample"},
    # The official rules stand beside each Benchmark as pure functions.
    "eval/benchmarks/": {"Benchmark", "build_prompt", "parse", "normalize", "score", "aggregate"},
}
# Participles and other words that say nothing about what a function does.
NOT_VERBS = {"found", "given", "checked", "located", "described", "instead", "said", "made", "some"}
FUNCTIONS = [function for path in FILES for function in find_functions(path)]


def is_core(path: Path) -> bool:
    name = name_file(path)
    return name.split("/")[0] in CORE and not name.startswith(NOT_CORE)


def report(what: str, faults: list[str]) -> None:
    """Fail and list all faults, one per line."""
    if faults:
        pytest.fail(f"{what}:\n  " + "\n  ".join(faults), pytrace=False)


def test_the_core_stays_small() -> None:
    rooms: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    core = 0
    for path in FILES:
        lines = count_code_lines(path)
        room = rooms[name_file(path).partition("/")[0]]
        room[0] += 1
        room[1] += lines
        core += lines * is_core(path)
    for name, (files, lines) in sorted(rooms.items()):
        print(f"{name:16}{files:4} files {lines:6,} lines of code")
    total = sum(lines for _, lines in rooms.values())
    print(f"core {core:,} of {CORE_LINES:,}, package {total:,}")
    assert core < CORE_LINES, f"the core has {core:,} lines of code, and its limit is {CORE_LINES:,}"


def test_files_are_short() -> None:
    lengths = {name_file(path): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    long = [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > FILE_LINES]
    report(
        f"files over {FILE_LINES} lines: move the second thing that they hold to a file of its own",
        [line for line in long if not line.startswith(LONG_FILES)],
    )


def test_functions_are_short() -> None:
    lengths = [(function.node.end_lineno - function.node.lineno + 1, function) for function in FUNCTIONS]
    report(
        f"functions over {FUNCTION_LINES} lines: give their steps names",
        [f"{function}: {lines} lines" for lines, function in lengths if lines > FUNCTION_LINES],
    )


def find_untyped(function: Function) -> list[str]:
    """Names of arguments without an annotation."""
    arguments = function.node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [each.arg for each in named if each and each.annotation is None and each.arg not in ("self", "cls")]


def test_public_arguments_are_typed() -> None:
    public = [
        function
        for function in FUNCTIONS
        if not function.nested and (function.node.name == "__init__" or not function.node.name.startswith("_"))
    ]
    untyped = [(function, find_untyped(function)) for function in public]
    report(
        "arguments of public functions without an annotation",
        [f"{function}: {', '.join(names)}" for function, names in untyped if names],
    )


def test_a_public_name_occurs_once() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in FILES:
        repeated = {name for folder, names in CONTRACTS.items() if name_file(path).startswith(folder) for name in names}
        for node in parse_file(path).body:
            is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_definition and not node.name.startswith("_") and node.name not in repeated:
                places[node.name].append(f"{name_file(path)}:{node.lineno}")
    report(
        "one name for several things (contracts are listed in CONTRACTS)",
        [f"{name}: {', '.join(where)}" for name, where in sorted(places.items()) if len(where) > 1],
    )


def test_functions_are_named_by_what_they_do() -> None:
    report(
        "functions whose name is no verb",
        [str(each) for each in FUNCTIONS if each.node.name.lstrip("_").split("_")[0] in NOT_VERBS],
    )
