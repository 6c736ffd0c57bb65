"""The factory finds every part, template, tuning, recipe and benchmark by the name of its file.

Add the file `tinyllava/connectors/mine.py`, and `connector: mine` works in a recipe: THE FILE NAME IS THE KEY. A recipe
can also name code outside the package, as `my_pkg.my_module:Name`, and a notebook can `register` an object.

    Factory("connectors").get("mlp")        # the Connector class of connectors/mlp.py
    Factory("connectors").list_names()      # what `tinyllava list` shows
"""

import difflib
import importlib
import os
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tinyllava.errors import UserError

ROOT = Path(__file__).parent
# The environment variable for modules, separated by commas, whose code a checkpoint may run.
TRUST = "TINYLLAVA_TRUST"


class Kind(NamedTuple):
    """The folder of the parts of one kind, and the name that each file defines (None: the part is the file itself)."""

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
    "benchmarks": Kind("eval/benchmarks", ".py", "Benchmark", "benchmark"),
}


def suggest_nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: `; did you mean 'mlp'?` if a known name is close, else a full stop."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "."


def suggest_known(name: str, known: Iterable[str]) -> str:
    """The end of an error message: `suggest_nearest`, and the list of what is known."""
    known = list(known)
    return f"{suggest_nearest(name, known)} Known: {', '.join(known) or 'none'}."


def load_code(address: str, what: str) -> Any:
    """Import the object at `package.module:Name`. Raises UserError if that fails."""
    module_name, _, attribute = address.partition(":")
    if not all(step and step.isprintable() for step in (*module_name.split("."), attribute)):
        raise UserError(f"{what} '{address}' is not the address of Python code. Expected package.module:Name.")
    if os.getcwd() not in sys.path:  # the console script, unlike `python -m`, does not search there
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"cannot load {what} '{address}': {error}. Check that Python can import it from this directory."
        ) from None


def check_trusted(address: str, what: str) -> None:
    """Raise UserError unless the code of a checkpoint may run: its module is imported already, or named in $TRUST."""
    module_name = address.partition(":")[0]
    if module_name not in sys.modules and module_name not in os.environ.get(TRUST, "").split(","):
        raise UserError(
            f"the checkpoint's {what} is code outside this package, {address}, which runs only if you trust it.\n"
            f"If you do, `import {module_name}` before you load, or set {TRUST}={module_name}."
        )


@cache  # each kind has one Factory: a part that one caller registers is there for all
class Factory:
    """The parts of one kind. `Factory("llms")` is the same object at every call, with all registered parts."""

    def __init__(self, kind: str) -> None:
        if kind not in KINDS:
            raise UserError(f"unknown kind of part '{kind}'{suggest_known(kind, KINDS)}")
        self.kind, self.registered = KINDS[kind], {}
        self.root = ROOT / self.kind.folder

    def list_names(self) -> list[str]:
        """Names of all parts of this kind, sorted: those of files in the package, and registered ones."""
        files = (path.stem for path in self.root.glob(f"*{self.kind.suffix}") if not path.stem.startswith("_"))
        return sorted({*files, *self.registered})

    def register(self, name: str, part: Any) -> None:
        """Make `part` available under `name` in this process. A file in the package needs no registration."""
        self.registered[name] = part

    def find_path(self, name: str) -> Path:
        """The file of a built-in part. Raises UserError for an unknown name."""
        path = self.root / f"{name}{self.kind.suffix}"
        if not os.path.isfile(path) or name.startswith("_"):
            own = f"A file of your own ends in {self.kind.suffix}."
            hint = "Name a class of your own as module:Class." if self.kind.attribute else own
            raise UserError(f"unknown {self.kind.singular} '{name}'{suggest_known(name, self.list_names())} {hint}")
        return path

    def get(self, name: str) -> Any:
        """The part called `name`: a class or module for Python parts, a path for templates and recipes.

        `package.module:Name` imports your own. Raises UserError for an unknown name and suggests the nearest one.
        """
        if name in self.registered:
            return self.registered[name]
        if ":" in name:
            return load_code(name, self.kind.singular)
        path = self.find_path(name)
        if self.kind.attribute is None:
            return path
        module = self._import(name)
        if not hasattr(module, self.kind.attribute):
            raise UserError(
                f"{module.__file__} is not a {self.kind.singular}: it does not define `{self.kind.attribute}`."
                f" Define it, or begin the file's name with an underscore."
            )
        return getattr(module, self.kind.attribute)

    def import_file(self, name: str | None) -> None:
        """Import the package's own file of this name, if there is one.

        For a `model_type`, call this before the Auto classes meet it: a file whose classes transformers does not have
        registers them when it is imported.
        """
        if name and (self.root / f"{name}.py").is_file() and not name.startswith("_"):
            self._import(name)

    def resolve(self, name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The part and its options. `name` can be a short name: `mlp2x_gelu` is mlp with two layers and GELU.

        A part with short names defines `from_short_name(name) -> options | None`. They begin with its file's name.
        For a class outside the package, `module:Class-words`, the short name is `Class-words`.
        """
        module, colon, own_name = name.partition(":")
        # No class name has a hyphen, so the words begin there.
        stems = [f"{module}:{own_name.partition('-')[0]}"] if colon else self.list_names()
        for stem in (stem for stem in stems if name.startswith(stem) and name not in (stem, *self.list_names())):
            part = self.get(stem)
            implied = part.from_short_name(own_name or name) if hasattr(part, "from_short_name") else None
            if implied is not None:
                return part, {**implied, **options}
        return self.get(name), options

    def _import(self, name: str) -> ModuleType:
        return importlib.import_module(f"tinyllava.{self.kind.folder.replace('/', '.')}.{name}")
