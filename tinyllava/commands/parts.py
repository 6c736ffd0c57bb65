"""`tinyllava list [KIND]`: list all parts, each with the first line of its file. No part is imported."""

import ast
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from tinyllava.config import NATIVE_TEMPLATE
from tinyllava.factory import Factory

NOTES = {
    "llms": "any `AutoModelForCausalLM` works by its Hub id or path, without a file; `nano` is part of the package",
    "vision_towers": "by Hub id or path; `nano` is part of the package",
    "templates": f"also `{NATIVE_TEMPLATE}`, the tokenizer's own; or a path to your .jinja file",
    "recipes": "or a path to your .yaml file",
    "benchmarks": "with variants such as vqav2-val (docs/evaluation.md); or a path to your .jsonl file",
}


def show_parts(kind: str, console: Console) -> None:
    """Print the parts of one kind. Raises UserError for an unknown kind."""
    factory = Factory(kind)
    parts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    parts.add_column(no_wrap=True, style="cyan")
    parts.add_column()
    for name in factory.list_names():
        part = factory.registered.get(name)
        parts.add_row(name, read_first_line(factory.find_path(name)) if part is None else describe_registered(part))
    console.print(f"[bold]{kind}[/]")
    console.print(Padding(parts, (0, 2)), highlight=False)
    if kind in NOTES:
        console.print(Padding(NOTES[kind], (0, 2)), style="dim", highlight=False)
    console.print()


def read_first_line(path: Path) -> str:
    """Read the first line of a Python file's docstring or of a YAML or jinja file's first comment; "" if none."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        description = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".jinja":
        comment = re.search(r"\{#-?(.*?)-?#\}", text, re.DOTALL)
        description = comment[1] if comment else ""
    else:
        comment = re.search(r"^#(.*)$", text, re.MULTILINE)
        description = comment[1] if comment else ""
    line = (description.strip().splitlines() or [""])[0].strip()
    return re.sub(rf"^`?(recipes/)?{re.escape(path.stem)}({re.escape(path.suffix)})?`?\s*(:|--)\s*", "", line)


def describe_registered(part: Any) -> str:
    """Return the first line of the docstring of a part that was registered in this process."""
    return ((getattr(part, "__doc__", None) or "registered in this process").strip().splitlines() or [""])[0]
