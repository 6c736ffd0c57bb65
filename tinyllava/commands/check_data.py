"""`tinyllava data check RECIPE | FILE`: read all data once before training does, and list every bad record.

Records are parsed and images decoded in full. Where a tokenizer is known, lengths and supervised tokens are checked.
"""

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tinyllava.config import DataSpec, Recipe, load_recipe
from tinyllava.console import messages
from tinyllava.data.bad_records import FIRST_IDS, SHORTENED, BadRecords
from tinyllava.data.encode import Encoder
from tinyllava.data.images import open_image
from tinyllava.data.options import DataOptions
from tinyllava.data.references import Reference, is_file_reference
from tinyllava.data.sample import Sample, SampleError
from tinyllava.data.sources import Source, open_source
from tinyllava.factory import Factory
from tinyllava.train.stage import make_data_options
from tinyllava.train.start import start_run

KINDS = {
    "no_conversation": "record without a conversation",
    "turn_order": "wrong order of turns",
    "placeholders": "<image> placeholders and images differ in number",
    "empty_answer": "empty answer",
    "missing_image": "image not found",
    "unreadable_image": "image cannot be read",
    "duplicate_id": "id used more than once",
    "too_long": "too long, even its first round",
    "shortened": "too long: would lose its last rounds",
    "nothing_to_learn": "nothing to learn",
    "contradiction": "says two different things",
    "unsupported_video": "has a video",
    "unsupported_audio": "has audio",
    "unsupported_file": "has a file that is not an image",
    "unsupported_tool": "uses tools",
    "unsupported_preference": "preference data: chosen and rejected answers",
    "unsupported_text": "has text beside its turns: a history, reasoning",
    "unsupported_image_key": "its images have a key that is not read",
    "unsupported_boxes": "boxes to be written into its text",
    "unsupported_weight": "a weight or flag that cannot be honoured",
}
IMAGE_KINDS = ("missing_image", "unreadable_image")
FEW = 64  # images; fewer per process are not worth its start
WINDOW = 4096  # images that are sent to the processes at a time, because images inside records take memory


class ExplainedRecords(BadRecords):
    """Bad records with what is wrong with each of the first ones, not only with the very first."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}

    def add(self, kind: str, identity: str, text: str) -> None:
        """Count one record."""
        super().add(kind, identity, text)
        if len(self.texts.setdefault(kind, [])) < FIRST_IDS:
            self.texts[kind].append(text)

    def list_first(self, kind: str) -> list[tuple[str, str]]:
        """(id, what is wrong) of the first records of a kind."""
        return list(zip(self.to_dict()[kind]["ids"], self.texts[kind], strict=True))


@dataclass
class DataReport:
    """The numbers of what was read, and the bad records."""

    records: int = 0
    images: int = 0
    text_only: int = 0
    bad_records: ExplainedRecords = field(default_factory=ExplainedRecords)

    @property
    def is_ok(self) -> bool:
        """Whether there is no bad record."""
        return not self.bad_records

    def describe_counts(self) -> str:
        """How much was checked."""
        return f"{self.records:,} records, {self.images:,} images, {self.text_only:,} records without an image"

    def make_table(self, first: int = 10) -> Table:
        """Make a rich table of the bad records by kind: the `first` of each, with what is wrong."""
        title = f"{self.records} records, {self.images} images, {self.text_only} records without an image"
        table = Table("problem", "records", "id", "what was found", title=title, title_justify="left")
        for kind, count in self.bad_records.count_kinds().items():
            for number, (identity, text) in enumerate(self.bad_records.list_first(kind)[:first]):
                heading = (KINDS.get(kind, kind), str(count)) if number == 0 else ("", "")
                table.add_row(*heading, escape(identity), escape(text))
            if count > first:
                table.add_row("", "", "...", f"{count - first} more")
            table.add_section()
        return table


class ShownImage(NamedTuple):
    """An image, and the ids of the records that contain it."""

    reference: Reference
    ids: list[str]


def check_source(source: str, images: list[str] | None = None) -> DataReport:
    """Check all data of `source`, a recipe or a file. `images`: the folders of a file's images.

    Raises UserError for a name that is neither a recipe nor data that can be opened.
    """
    recipes = Factory("recipes")
    if source in recipes.list_names() or source.endswith((".yaml", ".yml")):
        return check_recipe(load_recipe(source))
    if not Path(source).exists() and not any(mark in source for mark in ".:/"):
        recipes.find_path(source)  # raises UserError, with the nearest recipe
    return check_specs([DataSpec(path=source, images=images)])


def check_recipe(recipe: Recipe) -> DataReport:
    """Check all data of a recipe, once for each template with which it is used."""
    vlm = start_run(recipe, empty=True)
    report, checked = DataReport(), []
    for stage in recipe.stages.values():
        options = make_data_options(recipe, stage, vlm)
        validation = stage.validation if isinstance(stage.validation, list) else []
        for spec in [*stage.data, *validation]:
            # The same key gives the same result.
            key = (spec, options.template, options.max_length, options.supervised_turns)
            if key not in checked:
                checked.append(key)
                check_specs([spec], options, report=report)
    return report


def check_specs(
    specs: Sequence[DataSpec | str],
    options: DataOptions | None = None,
    progress: bool = True,
    report: DataReport | None = None,
) -> DataReport:
    """Check all of `specs` (a string is a data file). With `options`, also lengths and supervised tokens.

    Adds the result to `report` if one is given. Raises UserError for a file that cannot be opened at all.
    """
    encoder = Encoder(options) if options else None
    cache_dir = options.cache_dir if options else None
    sources = [open_source(DataSpec(path=spec) if isinstance(spec, str) else spec, cache_dir) for spec in specs]
    report = report or DataReport()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (progress and messages.is_terminal)
    with Progress(*columns, transient=True, console=messages, disable=hidden) as bar:
        for source in sources:
            files, embedded = _check_records(source, encoder, report, bar)
            report.images += len(files) + embedded
            _check_images(source, files, embedded, report.bad_records, bar)
    return report


def _check_records(
    source: Source, encoder: Encoder | None, report: DataReport, bar: Progress
) -> tuple[dict[str, list[str]], int]:
    """Check all records except their images.

    Returns the ids of the records by image file, and the number of images that are not files.
    """
    bad, seen = report.bad_records, Counter[str]()
    files: dict[str, list[str]] = {}
    embedded = 0
    total = None if source.streaming else len(source)
    for record in _track(source.iterate(), bar, f"Records of {source.path}", total):
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
            _check_sample(sample, source, encoder, bad)
        except SampleError as error:
            if error.kind not in IMAGE_KINDS:  # every image is decoded later
                bad.add(error.kind, record["id"], error.text)
    for identity, count in seen.items():
        if count > 1:
            bad.add("duplicate_id", identity, f"{count} records have it")
    return files, embedded


def _check_sample(sample: Sample, source: Source, encoder: Encoder | None, bad: BadRecords) -> None:
    """Raise SampleError if the sample cannot be trained on. One that would be shortened is added to `bad`."""
    if encoder is None:
        sample.check()
        if not any(message.learned for message in sample.messages if message.role == "assistant"):
            raise SampleError("nothing_to_learn", "none of its answers is learned", sample.id)
        return
    row = encoder.encode(sample, source.roots)
    if row["shortened"]:
        bad.add(SHORTENED, sample.id, f"more than {encoder.max_length} positions; {row['detail']}")


def _check_images(source: Source, files: dict[str, list[str]], embedded: int, bad: BadRecords, bar: Progress) -> None:
    """Decode every image once, and add the records of each image that cannot be read to `bad`."""
    images, total = _iterate_images(source, files, embedded), len(files) + embedded
    faults = _find_faults(images, source.roots, total)
    for image, fault in _track(faults, bar, f"Images of {source.path}", total):
        if fault is not None:
            for identity in image.ids:
                bad.add(fault.kind, identity, fault.text)


def _iterate_images(source: Source, files: dict[str, list[str]], embedded: int) -> Iterator[ShownImage]:
    """Yield each file once, then the images inside records or on the web."""
    for file, ids in files.items():
        yield ShownImage(file, ids)
    if embedded:
        for sample in source.iterate_samples():
            yield from (ShownImage(image, [sample.id]) for image in sample.images if not is_file_reference(image))


def _find_faults(
    images: Iterator[ShownImage], roots: list[str], count: int
) -> Iterator[tuple[ShownImage, SampleError | None]]:
    """Decode the images on all cores; yields each image with what is wrong with it, or None."""
    processes = min(os.cpu_count() or 1, count // FEW)
    if processes < 2:
        yield from ((image, _find_fault(image.reference, roots)) for image in images)
        return
    # "spawn", because this process may have threads (Arrow, tokenizers), and a fork would copy them in a broken state.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        while window := list(islice(images, WINDOW)):
            find = partial(_find_fault, roots=roots)
            faults = pool.map(find, (image.reference for image in window), chunksize=16)
            yield from zip(window, faults, strict=True)


def _find_fault(reference: Reference, roots: list[str]) -> SampleError | None:
    """Decode an image in full; returns what is wrong with it, or None."""
    try:
        open_image(reference, roots)
    except SampleError as error:
        return error
    return None


def _track(items: Iterable[Any], bar: Progress, description: str, total: int | None) -> Iterator[Any]:
    """Yield the items and show the progress in `bar`."""
    return iter(bar.track(items, total=total, description=escape(description)))
