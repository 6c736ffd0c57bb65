"""Show which other programs can run a checkpoint: the last lines of `train` and `export`."""

import shlex
from pathlib import Path

from rich.console import Console

from tinyllava.engines import list_lines
from tinyllava.runs import RECORD, read_json_or_empty


def show_engines(directory: Path, console: Console) -> None:
    """Print the table in the record of a checkpoint. Checkpoints of earlier versions have none."""
    engines = read_json_or_empty(directory / RECORD).get("engines", {})
    for line in list_lines(engines, shlex.quote(str(directory))):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
