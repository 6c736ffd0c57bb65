"""The rows of the fault table: what is played, and how the outcomes are shown."""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table

from tests.faults.scene import Outcome, Row

COLUMNS = ("fault", "where", "times", "the command says", "steps repeated", "final loss difference", "result")


@dataclass(frozen=True)
class Fault:
    """One fault: its name, where it strikes, and the function that plays it."""

    name: str
    where: str
    play: Row
    variant: str = "full"  # how the second stage trains: full, lora, or from a stream
    mounts: bool = False  # requires a file system of its own


@dataclass
class Played:
    """A fault with its outcome, or with the reason why it failed or was skipped."""

    fault: Fault
    outcome: Outcome | None = None
    failure: str = ""
    skipped: str = ""
    seconds: float = 0.0


def shorten(text: str, folder: str, most: int = 150) -> str:
    """A message without the folder of the scene, cut."""
    text = text.replace(f"{folder}/", "").replace(folder, "the folder").replace("|", "/")
    return text if len(text) <= most else f"{text[: most - 3]}..."


def make_rows(played: Iterable[Played]) -> list[list[str]]:
    """One row for each name and place, over all its times."""
    groups: dict[tuple[str, str], list[Played]] = {}
    for each in played:
        groups.setdefault((each.fault.name, each.fault.where), []).append(each)
    return [[name, where, str(len(group)), *describe_group(group)] for (name, where), group in groups.items()]


def describe_group(group: list[Played]) -> list[str]:
    """What was message, the steps repeated, the difference and the result of one row."""
    outcomes = [each.outcome for each in group if each.outcome]
    message = list(dict.fromkeys(outcome.message for outcome in outcomes))
    repeated = [outcome.repeated for outcome in outcomes if outcome.repeated is not None]
    differences = [outcome.difference for outcome in outcomes if outcome.difference is not None]
    span = f"{min(repeated)} to {max(repeated)}" if repeated and min(repeated) < max(repeated) else ""
    notes = list(dict.fromkeys(outcome.note for outcome in outcomes if outcome.note))
    failures = [each.failure for each in group if each.failure]
    skipped = [each.skipped for each in group if each.skipped]
    result = f"{len(outcomes)} of {len(group)}"
    result = "passed" if len(outcomes) == len(group) else f"{result} passed" if not skipped else "skipped"
    shown = [f"FAILED: {failure}" for failure in dict.fromkeys(failures)] + list(dict.fromkeys(skipped))
    return [
        message[0] if message else "",
        span or (str(repeated[0]) if repeated else ""),
        f"{max(differences):.1g}" if differences else "",
        "; ".join([result, *notes, *shown]),
    ]


def make_table(rows: list[list[str]]) -> Table:
    """The rows for a terminal."""
    table = Table(*COLUMNS, title="Faults", show_lines=True)
    for row in rows:
        table.add_row(*row, style="red" if "FAILED" in row[-1] else "yellow" if "skipped" in row[-1] else None)
    return table


def make_markdown(rows: list[list[str]]) -> str:
    """The rows for docs/scale.md."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
