"""Print the scores of results.json as a table, for `tinyllava train`, `eval` and `score`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tinyllava.console import output as stdout

LEGEND = "blind: asked without the image (baseline); majority: always the most frequent answer (baseline)"


def print_scores(results: Mapping[str, Any], tasks: Sequence[str] | None = None, console: Console = stdout) -> None:
    """Print each task and its categories, with 95 % intervals and the blind and majority baselines.

    A category is green if it is above both baselines by more than two standard errors, else yellow. `tasks`: print only
    these tasks.
    """
    entries = [results["tasks"][name] for name in tasks or results["tasks"]]
    blind = any(entry["blind"] is not None for entry in entries)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("score", "95 %", *(["blind"] if blind else []), "majority", "n"):
        table.add_column(name, justify="right")
    for entry in entries:
        add_rows(table, entry, blind)
    console.print(table)
    if blind:
        console.print(LEGEND, style="dim", highlight=False, soft_wrap=True)
    for entry in entries:
        for note in list_notes(entry):
            console.print(f"{escape(entry['title'])}: {note}", style="dim", highlight=False, soft_wrap=True)


def add_rows(table: Table, entry: Mapping[str, Any], blind: bool) -> None:
    """Add the row of a task, then the rows of its categories."""
    numbers = ["" if entry["score"] is None else f"{entry['score']:.2f}", format_interval(entry["interval"])]
    numbers += ["" if entry["blind"] is None else f"{entry['blind']:.1f}"] if blind else []
    title, metric = entry["title"], entry["metric"].removeprefix(entry["title"]).strip(" :")
    title = f"[bold]{escape(title)}[/] [dim]{escape(metric)}[/]"
    whole = entry["categories"].get("all")  # the only category of a benchmark without categories
    table.add_row(title, *numbers, format_percent(whole["majority"]) if whole else "", f"{entry['n']:,}")
    for name, row in entry["categories"].items() if not whole else ():
        style = "green" if is_above_baselines(row) else "yellow"
        cells = [f"[{style}]{format_percent(row['accuracy'])}[/]", format_interval(row["interval"], 100)]
        cells += [format_percent(row["blind"])] if blind else []
        table.add_row(f"  {escape(name)}", *cells, format_percent(row["majority"]), f"{row['n']:,}")


def list_notes(entry: Mapping[str, Any]) -> list[str]:
    """List what has no column: other metrics, files to upload, answers that cannot be read, ids that do not match."""
    numbers = {name: value for name, value in entry["metrics"].items() if isinstance(value, int | float)}
    notes = [", ".join(f"{name} {round(value, 4):g}" for name, value in numbers.items())] if numbers else []
    if entry["score"] is None:
        notes += [f"upload {name} to get a score" for name in entry["files"]]
    if entry["unparsed"]:
        notes.append(f"{entry['unparsed']:,} answers could not be read and count as wrong")
    counts = [f"{count:,} {name}" for name, count in entry.get("counts", {}).items() if count]
    if len(counts) > 2:  # the first two are the numbers of questions and answers
        notes.append(", ".join(counts))
    return notes


def is_above_baselines(row: Mapping[str, Any]) -> bool:
    """Whether an accuracy is above both baselines by more than two standard errors of the difference."""
    accuracy, baseline = row["accuracy"], max(row["blind"] or 0.0, row["majority"] or 0.0)
    variance = (accuracy * (1 - accuracy) + baseline * (1 - baseline)) / row["n"]
    return accuracy - baseline > 2 * variance**0.5


def format_percent(share: float | None) -> str:
    """Format 0.5 as "50.0" and None as ""."""
    return "" if share is None else f"{100 * share:.1f}"


def format_interval(interval: Sequence[float] | None, scale: float = 1) -> str:
    """Format an interval as "71.2-75.0", with a dash, and None as ""."""
    return "" if interval is None else "\u2013".join(f"{scale * bound:.1f}" for bound in interval)
