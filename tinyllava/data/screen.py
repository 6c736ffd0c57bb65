"""Which tokenised rows can be trained on, and the one message that says why others cannot.

Picture files are looked for before training starts, so that no run dies hours later over a file that never was there.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from tinyllava.config import DataSpec
from tinyllava.data.images import absent, is_file_reference
from tinyllava.data.sample import SampleError
from tinyllava.data.sources import Source
from tinyllava.errors import UserError

Report = dict[str, dict[str, Any]]  # kind -> {"count": ..., "ids": [first ten], "first": what was wrong with the first}
FIRST_IDS = 10


class WorkerError(UserError):
    """A UserError inside a DataLoader worker. torch raises it again as `Class(traceback text)`: keep the sentence."""

    def __init__(self, text: str) -> None:
        super().__init__(text.rsplit("WorkerError: ", 1)[-1].strip())


def bad_record(identity: str, error: SampleError) -> str:
    return f"record {identity}: {error.text}. Repair it, or set `on_bad_sample: skip`."


def usable(source: Source, table: datasets.Dataset, report: Report) -> np.ndarray:
    """Which rows can be trained on, bool [n]; the others go into `report`. Looks for every picture file."""
    ids, problems, details, images = (table.data.column(name) for name in ("id", "problem", "detail", "images"))

    def add(kind: str, row: int, text: str) -> None:
        note(report, kind, ids[row].as_py(), text)

    good = problems.is_null().to_numpy().copy()
    for row in map(int, np.flatnonzero(~good)):
        add(problems[row].as_py(), row, details[row].as_py())
    for row in map(int, np.flatnonzero(column(table, "shortened"))):
        add("shortened", row, details[row].as_py())
    names = pc.unique(pc.list_flatten(images)).to_pylist()
    lost = absent_files(filter(is_file_reference, names), source.roots)
    if lost:
        for row in map(int, np.flatnonzero(good)):
            error = next((lost[name] for name in images[row].as_py() if name in lost), None)
            if error is not None:
                add(error.kind, row, error.text)
                good[row] = False
    return good


def absent_files(names: Iterable[str], roots: Sequence[str]) -> dict[str, SampleError]:
    """The picture files that are not there, or empty. 32 threads, as one look over a network takes a millisecond."""
    names = sorted(names)

    def look(chunk: list[str]) -> list[tuple[str, SampleError | None]]:
        return [(name, absent(name, roots)) for name in chunk]

    with ThreadPoolExecutor(32) as pool:
        results = pool.map(look, (names[start : start + 1000] for start in range(0, len(names), 1000)))
        return {name: error for chunk in results for name, error in chunk if error is not None}


def note(report: Report, kind: str, identity: str, text: str | None) -> None:
    """Count one record in `report`."""
    entry = report.setdefault(kind, {"count": 0, "ids": [], "first": text})
    entry["count"] += 1
    if len(entry["ids"]) < FIRST_IDS:
        entry["ids"].append(identity)


def refuse(report: Report, specs: Sequence[DataSpec], records: int) -> None:
    """Raise UserError if `report` holds bad samples; shortened ones are not."""
    bad = {kind: entry for kind, entry in report.items() if kind != "shortened"}
    if not bad:
        return
    worst_first = sorted(bad, key=lambda kind: -bad[kind]["count"])
    kinds = "; ".join(f"{bad[kind]['count']} {kind} ({_first(bad[kind])})" for kind in worst_first)
    example = bad[worst_first[0]]
    command = f"tinyllava data check {specs[0].path if len(specs) == 1 else 'RECIPE'}"
    raise UserError(
        f"{sum(entry['count'] for entry in bad.values())} of {records} records cannot be used: {kinds}. "
        f"{example['ids'][0]}: {example['first']}.\n"
        f"Run `{command}` to see all, or set `on_bad_sample: skip`."
    )


def _first(entry: dict[str, Any], number: int = 3) -> str:
    return ", ".join(entry["ids"][:number]) + (", ..." if entry["count"] > number else "")


def column(table: datasets.Dataset, name: str) -> np.ndarray:
    """A number column without its Python objects."""
    return table.data.column(name).to_numpy()
