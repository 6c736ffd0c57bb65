"""`tinyllava data check RECIPE | FILE`: read everything once, before training does, and say what is wrong where.

Records are parsed, pictures decoded in full, and, where a tokenizer is known, lengths and supervised tokens counted.
"""

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tinyllava.config import DataSpec
from tinyllava.console import messages
from tinyllava.data.encode import Encoder
from tinyllava.data.images import Reference, is_file_reference, problem_with
from tinyllava.data.sample import SampleError
from tinyllava.data.sources import Source, read
from tinyllava.data.template import Template
from tinyllava.data.tiles import Tiles

KINDS = {
    "no_conversation": "record without a conversation",
    "turn_order": "broken turn order",
    "placeholders": "<image> placeholders and pictures differ in number",
    "empty_answer": "empty answer",
    "missing_image": "picture not found",
    "unreadable_image": "picture cannot be read",
    "duplicate_id": "id used more than once",
    "too_long": "too long, even its first round",
    "shortened": "over-long: would lose its last rounds",
    "nothing_to_learn": "nothing to learn",
}
FEW = 64  # pictures: fewer are decoded here, as starting processes would take longer
WINDOW = 4096  # pictures handed to the processes at a time: bounds the memory of those that lie inside records


@dataclass
class Problem:
    kind: str
    id: str
    path: str  # of the data file
    text: str


@dataclass
class Report:
    """What `check` read and what it found wrong."""

    records: int = 0
    pictures: int = 0
    text_only: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def counts(self) -> Counter[str]:
        return Counter(problem.kind for problem in self.problems)

    def table(self, first: int = 10) -> Table:
        """For rich: the problems by kind, the `first` records of each with what is wrong."""
        title = f"{self.records} records, {self.pictures} pictures, {self.text_only} records without a picture"
        table = Table("problem", "records", "id", "what was found", title=title, title_justify="left")
        for kind, count in self.counts.most_common():
            shown = [problem for problem in self.problems if problem.kind == kind][:first]
            for number, problem in enumerate(shown):
                heading = (KINDS.get(kind, kind), str(count)) if number == 0 else ("", "")
                table.add_row(*heading, escape(problem.id), escape(problem.text))
            if count > first:
                table.add_row("", "", "...", f"{count - first} more")
            table.add_section()
        return table


def check(
    specs: Sequence[DataSpec | str],
    template: Template | None = None,
    tokenizer: Any = None,
    tokens_per_image: int | None = None,
    max_length: int | None = None,
    progress: bool = True,
    cache_dir: str | Path | None = None,
    tiles: Tiles | None = None,
) -> Report:
    """Read all of `specs` (a string is a data file). Lengths need the template, the tokenizer and both numbers.

    Raises UserError for a file that cannot be opened at all.
    """
    encoder = None
    if template is not None and tokenizer is not None and tokens_per_image is not None and max_length is not None:
        encoder = Encoder(template, tokenizer, tokens_per_image, max_length, tiles)
    sources = [read(DataSpec(path=spec) if isinstance(spec, str) else spec, cache_dir) for spec in specs]
    report = Report()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (progress and messages.is_terminal)
    with Progress(*columns, transient=True, console=messages, disable=hidden) as bar:
        for source in sources:
            _check_source(source, encoder, report, bar)
    return report


def _check_source(source: Source, encoder: Encoder | None, report: Report, bar: Progress) -> None:
    seen: Counter[str] = Counter()
    files: dict[str, list[str]] = {}  # picture file -> ids of the records that show it
    embedded = 0

    def add(kind: str, identity: str, text: str) -> None:
        report.problems.append(Problem(kind, identity, source.path, text))

    total = None if source.streaming else len(source)
    for record in _counted(source.iterate(), bar, f"Records of {source.path}", total):
        report.records += 1
        seen[record["id"]] += 1
        try:
            sample = source.to_sample(record)
            report.text_only += not sample.images
            for image in sample.images:
                if is_file_reference(image):
                    files.setdefault(image, []).append(sample.id)
                else:
                    embedded += 1
            if encoder is None:
                sample.check()
            else:
                row = encoder.encode(sample, source.roots)
                if row["shortened"]:
                    add("shortened", sample.id, f"more than {encoder.max_length} positions; {row['detail']}")
        except SampleError as error:
            if error.kind not in ("missing_image", "unreadable_image"):  # every picture is decoded below
                add(error.kind, record["id"], error.text)
    for identity, count in seen.items():
        if count > 1:
            add("duplicate_id", identity, f"{count} records have it")
    report.pictures += len(files) + embedded
    pictures = _pictures(source, files, embedded)
    for (ids, _), problem in _counted(
        _decoded(pictures, source.roots, len(files) + embedded),
        bar,
        f"Pictures of {source.path}",
        len(files) + embedded,
    ):
        if problem is not None:
            kind, text = problem
            for identity in ids:
                add(kind, identity, text)


def _pictures(source: Source, files: dict[str, list[str]], embedded: int) -> Iterator[tuple[list[str], Reference]]:
    """(ids, picture): each file once, then the pictures that lie inside records or on the web."""
    for file, ids in files.items():
        yield ids, file
    if not embedded:
        return
    for record in source.iterate():
        try:
            sample = source.to_sample(record)
        except SampleError:
            continue
        yield from (([sample.id], image) for image in sample.images if not is_file_reference(image))


def _decoded(
    pictures: Iterator[tuple[list[str], Reference]], roots: list[str], count: int
) -> Iterator[tuple[Any, Any]]:
    """((ids, picture), problem or None) of each, decoded on all cores."""
    processes = min(os.cpu_count() or 1, count // FEW)
    if processes < 2:
        yield from ((picture, problem_with(picture[1], roots)) for picture in pictures)
        return
    # "spawn": this process may hold threads (Arrow, tokenizers), which a fork copies in an undefined state.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        while window := list(islice(pictures, WINDOW)):
            look = partial(problem_with, roots=roots)
            problems = pool.map(look, (reference for _, reference in window), chunksize=16)
            yield from zip(window, problems, strict=True)


def _counted(items: Iterator[Any], bar: Progress, description: str, total: int | None) -> Iterator[Any]:
    return iter(bar.track(items, total=total, description=escape(description)))
