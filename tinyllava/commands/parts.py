"""`tinyllava list [KIND]`: every part there is, with the first line of its own file. Nothing is imported for it."""

import ast
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from tinyllava.config import NATIVE_TEMPLATE
from tinyllava.factory import KINDS, Factory

NOTES = {
    "llms": "any `AutoModelForCausalLM` works by its Hub id or path, without a file; `nano` comes with the package",
    "vision_towers": "by Hub id or path; `nano` comes with the package",
    "templates": f"also `{NATIVE_TEMPLATE}`: the tokenizer's own; or a path to your .jinja",
    "recipes": "or a path to your .yaml",
    "benchmarks": "with variants such as vqav2-val (docs/evaluation.md); or a path to your .jsonl",
}


def show(kind: str, console: Console) -> None:
    """Print the parts of one kind. Raises UserError for an unknown kind."""
    factory = Factory(kind)
    parts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    parts.add_column(no_wrap=True, style="cyan")
    parts.add_column()
    for name in factory.names():
        part = factory.registered.get(name)
        parts.add_row(name, first_line(factory.path(name)) if part is None else documented(part))
    console.print(f"[bold]{kind}[/]")
    console.print(Padding(parts, (0, 2)), highlight=False)
    if kind in NOTES:
        console.print(Padding(NOTES[kind], (0, 2)), style="dim", highlight=False)
    console.print()


def kinds() -> list[str]:
    """All kinds, in the order in which a run meets them."""
    return list(KINDS)


def first_line(path: Path) -> str:
    """The first line of a Python file's docstring, or the first comment of a YAML or jinja file; "" without one."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        found = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".jinja":
        comment = re.search(r"\{#-?(.*?)-?#\}", text, re.DOTALL)
        found = comment[1] if comment else ""
    else:
        comment = re.search(r"^#(.*)$", text, re.MULTILINE)
        found = comment[1] if comment else ""
    line = (found.strip().splitlines() or [""])[0].strip()
    return re.sub(rf"^`?(recipes/)?{re.escape(path.stem)}({re.escape(path.suffix)})?`?\s*(:|--)\s*", "", line)


def documented(part: Any) -> str:
    """The first line of the docstring of what was registered in this process."""
    return ((getattr(part, "__doc__", None) or "registered in this process").strip().splitlines() or [""])[0]
