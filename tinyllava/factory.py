"""The factory: every interchangeable part is found by its file's name.

Drop `tinyllava/connectors/mine.py` into the package and `connector: mine` works in a recipe: THE FILE NAME IS THE KEY.
A recipe may also name code outside the package as `my_pkg.my_module:Name`, and a notebook may `register` an object.

    Factory("connectors").get("mlp")        # the Connector class of connectors/mlp.py
    Factory("connectors").names()           # what `tinyllava list` shows
"""

import difflib
import importlib
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tinyllava.errors import UserError

ROOT = Path(__file__).parent
TRUST = "TINYLLAVA_TRUST"  # modules, joined by commas, that a checkpoint may name as its code


class Kind(NamedTuple):
    """Where the parts of one kind lie, and which name in each file is the part (None: the module or file itself)."""

    folder: str
    suffix: str
    attribute: str | None
    singular: str


KINDS = {
    "connectors": Kind("connectors", ".py", "Connector", "connector"),
    "vision_towers": Kind("vision_towers", ".py", "VisionTower", "vision tower"),
    "llms": Kind("llms", ".py", "LLM", "LLM"),
    "templates": Kind("templates", ".jinja", None, "template"),
    "tuning": Kind("tuning", ".py", "Tuning", "tuning"),
    "recipes": Kind("recipes", ".yaml", None, "recipe"),
    "benchmarks": Kind("eval/benchmarks", ".py", None, "benchmark"),
}


def nearest(name: str, known: list[str]) -> str:
    """The end of a sentence: `; did you mean 'mlp'?` when some known name is close, else a full stop."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "."


def load_code(address: str, what: str) -> Any:
    """What stands at `package.module:Name`. Raises UserError when it cannot be imported."""
    module_name, _, attribute = address.partition(":")
    if os.getcwd() not in sys.path:  # the console script, unlike `python -m`, does not look beside the recipe
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot load {what} '{address}': {error}. Is it importable from here?") from None


def check_trusted(address: str, what: str) -> None:
    """Raise UserError unless code that a checkpoint names may run: its module is imported already, or in $TRUST."""
    module_name = address.partition(":")[0]
    if module_name not in sys.modules and module_name not in os.environ.get(TRUST, "").split(","):
        raise UserError(
            f"the checkpoint's {what} is code of its author's or yours, {address}, which does not run unasked.\n"
            f"If you trust it, `import {module_name}` before you load, or set {TRUST}={module_name}."
        )


class Factory:
    """The parts of one kind. All factories of a kind share what was registered."""

    def __new__(cls, kind: str) -> "Factory":
        return _factory(kind)

    def names(self) -> list[str]:
        """Names of all parts of this kind, sorted: files in the package, then whatever was registered."""
        files = (path.stem for path in self.root.glob(f"*{self.kind.suffix}") if not path.stem.startswith("_"))
        return sorted({*files, *self.registered})

    def register(self, name: str, part: Any) -> None:
        """Make `part` available under `name` in this process (for notebooks and tests; a file needs no
        registration).
        """
        self.registered[name] = part

    def path(self, name: str) -> Path:
        """The file of a built-in part. Raises UserError for an unknown name."""
        path = self.root / f"{name}{self.kind.suffix}"
        if not path.is_file() or name.startswith("_"):
            self.unknown(name)
        return path

    def get(self, name: str) -> Any:
        """The part called `name`: a class or module for Python parts, a path for templates and recipes.

        `package.module:Name` imports the user's own. Raises UserError for an unknown name, with the nearest known one.
        """
        if name in self.registered:
            return self.registered[name]
        if ":" in name:
            return self.load_from(name)
        path = self.path(name)
        if self.kind.suffix != ".py":
            return path
        package = "tinyllava." + self.kind.folder.replace("/", ".")
        return self.part_of(importlib.import_module(f"{package}.{path.stem}"))

    def resolve(self, name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The part and its options, with the field's short names understood (`mlp2x_gelu`: mlp with two layers and
        GELU).

        A part that has short names defines `from_short_name(name) -> options | None`, and its file's name begins them.
        """
        if name not in self.names() and ":" not in name:
            for stem in (known for known in self.names() if name.startswith(known)):
                part = self.get(stem)
                short = part.from_short_name(name) if hasattr(part, "from_short_name") else None
                if short is not None:
                    return part, {**short, **options}
        return self.get(name), options

    def load_from(self, address: str) -> Any:
        """The user's own part at `package.module:Name`."""
        return load_code(address, self.kind.singular)

    def part_of(self, module: ModuleType) -> Any:
        """What a Python file of this kind offers."""
        if self.kind.attribute is None:
            return module
        if not hasattr(module, self.kind.attribute):
            raise UserError(f"{module.__file__} defines no `{self.kind.attribute}`, so it is no {self.kind.singular}.")
        return getattr(module, self.kind.attribute)

    def unknown(self, name: str) -> None:
        """Raise the error of an unknown name."""
        known = self.names()
        raise UserError(f"unknown {self.kind.singular} '{name}'{nearest(name, known)} Known: {', '.join(known)}.")


@cache
def _factory(kind: str) -> Factory:
    if kind not in KINDS:
        raise UserError(f"unknown kind of part '{kind}'{nearest(kind, list(KINDS))} Known: {', '.join(KINDS)}.")
    factory = object.__new__(Factory)
    factory.kind, factory.registered = KINDS[kind], {}
    factory.root = ROOT / factory.kind.folder
    return factory
