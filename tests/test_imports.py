"""The rules of the architecture: a file imports only from rooms below, and importing the package is fast."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.source_tree import FILES, PACKAGE, PARTS, name_file, name_module, parse_file

# From the ground up. A file imports from its own room and from rooms before it. `explain`, `serve` and `sweep` are not
# there yet, and have their place already. `guards` uses models and data, and `train` uses `guards`.
ROOMS = (
    "errors",
    "ground",
    "factory",
    "generation",
    "config",
    "parts",
    "stamps",
    "data",
    "model",
    "checkpoint",
    "guards",
    "train",
    "infer",
)
ROOMS += ("explain", "eval", "pages", "serve", "sweep", "commands", "cli")
# Files directly in tinyllava/ that everything above may use. They import only each other and
# `errors`, so nothing of parts, models or training. A new file gets a name here.
GROUND = ("atomic", "files", "provenance", "console", "cache", "runs", "identity", "engines")
GROUND += ("downloads", "failures", "find", "gguf_files", "hashes", "interrupt", "json_records", "lanes", "locks")
GROUND += ("memory", "record", "resume", "sandbox", "secrets", "trackers", "yaml_faults")
NEVER = {"train": ("eval",)}  # whatever the order of the rooms: a run is scored by the command line
# Files that import a module whose name they do not know: the user's own code, and parts by their file's name.
BY_ANY_NAME = ("factory.py", "data/sources/__init__.py")
HEAVY = ("torch", "transformers", "datasets", "matplotlib")
# The package's own namespace offers `load`, and `python -m tinyllava` is the command line.
CHECKED = [path for path in FILES if name_file(path) not in ("__init__.py", "__main__.py")]


def find_room(module: str) -> str:
    """The room of `tinyllava.x.y`."""
    first = module.split(".")[1] if "." in module else module
    return {**dict.fromkeys(PARTS, "parts"), **dict.fromkeys(GROUND, "ground")}.get(first, first)


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def find_dynamic_imports(path: Path) -> list[tuple[int, str | None]]:
    """(line, target) of each `import_module(...)` and `__import__(...)`.

    The target is a literal, or an f-string up to its first placeholder, and None for any other expression.
    """
    calls = []
    for node in ast.walk(parse_file(path)):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", None))
        if called not in ("import_module", "__import__"):
            continue
        argument = node.args[0] if node.args else None
        if isinstance(argument, ast.JoinedStr):
            argument = argument.values[0]
        value = argument.value if isinstance(argument, ast.Constant) else None
        calls.append((node.lineno, value if isinstance(value, str) else None))
    return calls


def find_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it and in any way."""
    modules = set()
    for node in ast.walk(parse_file(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tinyllava":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules |= {name if is_module(name) else node.module for name in names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.split(".")[0] == "tinyllava"}
    targets = [target for _, target in find_dynamic_imports(path) if target and target.startswith("tinyllava.")]
    modules |= {target.rstrip(".") for target in targets if target != "tinyllava."}
    return modules


@pytest.mark.parametrize("path", CHECKED, ids=name_file)
def test_a_file_imports_only_from_rooms_below(path: Path) -> None:
    module = name_module(path)
    room = find_room(module)
    assert room in ROOMS, f"{module} is in no room of tests/test_imports.py: give it a place in ROOMS"
    for imported in sorted(find_imports(path)):
        other = find_room(imported)
        assert other in ROOMS, f"{module} imports {imported}, which is in no room"
        assert other not in NEVER.get(room, ()), f"{module} imports {imported}: {room} never imports {other}"
        assert ROOMS.index(other) <= ROOMS.index(room), f"{module} ({room}) imports {imported} ({other}), a room above"
        if room == "parts":
            contract = ".".join(module.split(".")[:2])
            allowed = ("tinyllava.errors", "tinyllava.factory") if module == contract else ("tinyllava.errors",)
            is_own = imported == contract or imported.startswith(f"{contract}.")
            assert is_own or imported in allowed, f"{module} imports {imported}: a part knows only its contract"


@pytest.mark.parametrize("room", ROOMS)
def test_the_files_of_a_room_form_no_cycle(room: str) -> None:
    files = {name_module(path): path for path in CHECKED if find_room(name_module(path)) == room}
    graph = {module: (find_imports(path) & files.keys()) - {module} for module, path in files.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"files of {room} import each other in a circle: {' -> '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize("path", FILES, ids=name_file)
def test_dynamic_imports_name_their_module(path: Path) -> None:
    if name_file(path) in BY_ANY_NAME:
        return
    for line, target in find_dynamic_imports(path):
        readable = target is not None and target != "tinyllava."
        assert readable, f"{name_file(path)}:{line} imports a module whose name is computed: use Factory instead"


@pytest.mark.parametrize("path", FILES, ids=name_file)
def test_no_file_uses_a_private_name_of_another(path: Path) -> None:
    """The files of a room may share a private file (`_hub.py`). Its underscore only says that it is not a part."""
    modules = set()
    for node in ast.walk(parse_file(path)):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "tinyllava":
            continue
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            modules |= {alias.asname or alias.name} if is_module(full) else set()
            file = full if is_module(full) else node.module
            in_private_file = any(step.startswith("_") for step in file.split("."))
            fault = f"{name_file(path)}:{node.lineno} imports {full}: give it a public name, or move it"
            assert is_module(full) or not alias.name.startswith("_"), fault
            assert not in_private_file or find_room(full) == find_room(name_module(path)), fault
    for node in ast.walk(parse_file(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not private, f"{name_file(path)}:{node.lineno} uses {node.value.id}.{node.attr}"


def test_importing_the_package_and_its_command_line_is_light() -> None:
    code = f"import sys, tinyllava, tinyllava.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_no_file_catches_everything() -> None:
    for path in FILES:
        for node in ast.walk(parse_file(path)):
            if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):  # tidying up is fine
                name = getattr(node.type, "id", None)
                assert node.type is not None and name not in {"Exception", "BaseException"}, f"{path}:{node.lineno}"
