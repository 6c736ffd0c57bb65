"""The architecture's rules: data flows one way, and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tinyllava"
# A room may import from the rooms before it. `data` knows no model, and `train` never imports `eval`.
ROOMS = ("errors", "console", "factory", "config", "data", "parts", "model", "train", "infer", "eval", "serve", "cli")
PARTS = ("connectors", "vision_towers", "llms", "templates", "tuning")
CONTRACTS = ("tinyllava.errors",)


def room(module: str) -> str:
    """The room of `tinyllava.x.y`."""
    first = module.split(".")[1] if "." in module else "errors"
    return "parts" if first in PARTS else {"commands": "cli"}.get(first, first)


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "tinyllava" else [node.module]
            )
            found |= {name for name in names if name.startswith("tinyllava")}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("tinyllava")}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py" and path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    module = ".".join(("tinyllava", *path.relative_to(PACKAGE).with_suffix("").parts))
    own = room(module)
    for name in imported(path):
        other = room(name)
        if own == "train":
            assert other != "eval", f"{module} imports {name}"
        assert ROOMS.index(other) <= ROOMS.index(own), f"{module} ({own}) imports {name} ({other})"
        if own == "parts":
            contract = ".".join(module.split(".")[:2])
            assert name.startswith((contract, *CONTRACTS)), f"{module} imports {name}, which is not its contract"


def test_importing_the_package_and_its_command_line_is_light() -> None:
    heavy = ("torch", "transformers", "datasets", "matplotlib")
    code = f"import sys, tinyllava, tinyllava.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_no_file_catches_everything() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):  # tidying up is fine
                name = getattr(node.type, "id", None)
                assert node.type is not None and name not in {"Exception", "BaseException"}, f"{path}:{node.lineno}"
