"""The score table of results.json, as `tinyllava train`, `eval` and `score` print it."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tinyllava.console import output as stdout


def print_scores(results: Mapping[str, Any], tasks: Sequence[str] | None = None, console: Console = stdout) -> None:
    """Each task and its categories, with 95 % intervals, beside what was asked blind and the majority's answer.

    Green: above both baselines by more than two standard errors; yellow: not. `tasks`: only these.
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
    for entry in entries:
        for note in notes(entry):
            console.print(f"{escape(entry['title'])}: {note}", style="dim", highlight=False, soft_wrap=True)


def add_rows(table: Table, entry: Mapping[str, Any], blind: bool) -> None:
    """A task's own row, then its categories'."""
    numbers = ["" if entry["score"] is None else f"{entry['score']:.2f}", span(entry["interval"])]
    numbers += ["" if entry["blind"] is None else f"{entry['blind']:.1f}"] if blind else []
    title, metric = entry["title"], entry["metric"].removeprefix(entry["title"]).strip()
    title = f"[bold]{escape(title)}[/] [dim]{escape(metric)}[/]"
    sole = entry["categories"].get("all")  # of questions without categories
    table.add_row(title, *numbers, percent(sole["majority"]) if sole else "", f"{entry['n']:,}")
    for name, row in entry["categories"].items() if not sole else ():
        style = "green" if stands_out(row) else "yellow"
        cells = [f"[{style}]{percent(row['accuracy'])}[/]", span(row["interval"], 100)]
        cells += [percent(row["blind"])] if blind else []
        table.add_row(f"  {escape(name)}", *cells, percent(row["majority"]), f"{row['n']:,}")


def notes(entry: Mapping[str, Any]) -> list[str]:
    """What has no column: the scorer's other numbers, answers that could not be read, ids that do not fit."""
    numbers = {name: value for name, value in entry["metrics"].items() if isinstance(value, int | float)}
    found = [", ".join(f"{name} {round(value, 4):g}" for name, value in numbers.items())] if numbers else []
    if entry["score"] is None:
        found += [f"{name} is to be uploaded" for name in entry["files"]]
    if entry["unparsed"]:
        found.append(f"{entry['unparsed']:,} could not be read, and count as wrong")
    stray = [f"{count:,} {what}" for what, count in entry.get("counts", {}).items() if count]
    if len(stray) > 2:  # beside the numbers of questions and answers
        found.append(", ".join(stray))
    return found


def stands_out(row: Mapping[str, Any]) -> bool:
    """Whether an accuracy is above blind and majority by more than two standard errors of their difference."""
    seen, best = row["accuracy"], max(row["blind"] or 0.0, row["majority"] or 0.0)
    return seen - best > 2 * ((seen * (1 - seen) + best * (1 - best)) / row["n"]) ** 0.5


def percent(share: float | None) -> str:
    """0.5 as 50.0; nothing for None."""
    return "" if share is None else f"{100 * share:.1f}"


def span(interval: Sequence[float] | None, scale: float = 1) -> str:
    """An interval, such as 71.2-75.0; nothing for None."""
    return "" if interval is None else "\u2013".join(f"{scale * bound:.1f}" for bound in interval)
