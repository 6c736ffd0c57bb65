"""`tinyllava data prepare NAME ...`: download a dataset, or print where to download it; then check what is there.

The checks are the same with and without a download, so they also report what is missing on a machine without a network.
"""

import logging
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape

from tinyllava.data.images import find_file_fault
from tinyllava.data.prepare import DatasetDescription, list_datasets, load_description
from tinyllava.data.prepare.check import ItemStatus, RecordCount, check_item, count_records
from tinyllava.data.prepare.fetch import DownloadError, Unreachable, fetch_item
from tinyllava.errors import UserError
from tinyllava.factory import Factory

logger = logging.getLogger("tinyllava")


def prepare_datasets(names: list[str], root: Path, download: bool, console: Console) -> bool:
    """Download (with `download`) and check the datasets called `names`; return whether nothing is missing."""
    # All descriptions first, so that a wrong name is an error before a long download.
    datasets = {name: load_description(name) for name in names}
    unreachable: dict[str, str] = {}
    if download:
        for dataset in datasets.values():
            _fetch_missing(dataset, root, unreachable)
    if unreachable:
        logger.warning(
            "cannot connect to %s (%s). Only the files on this machine are checked. Run the command again with "
            "a network to resume",
            ", ".join(unreachable),
            next(iter(unreachable.values())),
        )
    reports = [_report_dataset(name, dataset, root, console) for name, dataset in datasets.items()]
    return all(reports)


def show_datasets(console: Console) -> None:
    """Print the datasets that `data prepare` knows."""
    for name in list_datasets():
        console.print(f"{name:12}{load_description(name).title}", highlight=False)


def _fetch_missing(dataset: DatasetDescription, root: Path, unreachable: dict[str, str]) -> None:
    """Download what is missing. An item that fails is reported, and the next one is tried.

    `unreachable` collects the hosts without a connection and the reason. Further items from such a host are skipped.
    """
    for item in dataset.items:
        if item.page or check_item(item, root).is_complete:
            continue
        host = "the Hub" if item.hub else urlsplit(item.url).hostname
        if host in unreachable:
            continue
        logger.info("downloading %s from %s", item.path, item.source)
        try:
            fetch_item(item, root)
        except Unreachable as error:
            unreachable[host] = str(error)
        except DownloadError as error:
            logger.warning("%s", error)


def _report_dataset(name: str, dataset: DatasetDescription, root: Path, console: Console) -> bool:
    """Print what is there of a dataset and what is missing; return whether everything required is there."""
    console.print(f"[bold]{dataset.title}[/]  {dataset.page}", highlight=False, soft_wrap=True)
    console.print(f"licence: {dataset.licence}", highlight=False)
    if dataset.about:
        console.print(dataset.about, highlight=False)
    statuses = [check_item(item, root) for item in dataset.items]
    width = max(len(item.path) for item in dataset.items)
    for status in statuses:
        line = f"{status.item.path:{width}}  {_describe_status(status)}"
        console.print(f"  {_mark_status(status)}  {escape(line)}", highlight=False, soft_wrap=True)
    is_complete = all(status.is_complete or status.item.optional for status in statuses)
    if dataset.kind == "benchmark":
        return _check_questions(name, dataset, root, console, show_error=is_complete) and is_complete
    for annotations in dataset.annotations:
        if (root / annotations.path).is_file():
            is_complete &= _report_records(count_records(dataset, annotations, root), console)
    return is_complete


def _mark_status(status: ItemStatus) -> str:
    if status.is_complete:
        return "[green]ok      [/]"
    return "[dim]optional[/]" if status.item.optional else "[red]missing [/]"


def _describe_status(status: ItemStatus) -> str:
    """Return what is there of an item; if it is not complete, also where to download it."""
    item = status.item
    if status.is_complete:
        return status.text
    source = f"download by hand, {item.how}: {item.page}" if item.page else f"download from {item.source}"
    if item.optional:
        return f"{source} (only for {item.optional})"
    return f"{status.text}; {source}" if status.text else source


def _check_questions(name: str, dataset: DatasetDescription, root: Path, console: Console, show_error: bool) -> bool:
    """Read a benchmark as `tinyllava eval` does, and check that its images exist; return whether it is complete.

    `show_error`: print why it cannot be read. It is False if the reason is an item that is reported as missing already.
    """
    try:
        questions = Factory("benchmarks").get(name)().questions(root)
    except UserError as error:
        if show_error:
            console.print(f"  [red]{escape(str(error))}[/]", highlight=False, soft_wrap=True)
        return False
    images = list(dict.fromkeys(image for question in questions for image in question.images))
    missing = [error for image in images if (error := find_file_fault(image, ()))]
    text = f"{len(questions):,} questions on {len(images):,} images"
    if dataset.questions and len(questions) != dataset.questions:
        text += f" (the release has {dataset.questions:,} questions)"
    text += f", {len(missing):,} images missing: {missing[0]}" if missing else ", no image missing"
    is_complete = not missing and len(questions) >= (dataset.questions or 0)
    style = "green" if is_complete else "red"
    console.print(f"  {escape(text)}", style=style, highlight=False, soft_wrap=True)
    return is_complete


def _report_records(result: RecordCount, console: Console) -> bool:
    """Print what a training file holds, and how many of its images are missing in each folder."""
    expected = result.annotations
    counts = f"{result.records:,} records, {result.with_picture:,} with an image"
    if not result.is_release:
        with_image = "" if expected.with_picture is None else f", {expected.with_picture:,} with an image"
        counts += f" (expected {expected.records:,}{with_image}: is this another release?)"
    console.print(f"  {escape(f'{expected.path}: {result.fault or counts}')}", highlight=False, soft_wrap=True)
    for name, folder in sorted(result.folders.items()):
        text = f"{name}: {folder.images:,} images, "
        text += (
            f"{folder.missing:,} missing, such as {', '.join(folder.examples)}" if folder.missing else "none missing"
        )
        style = "red" if folder.missing else "green"
        console.print(f"    {escape(text)}", style=style, highlight=False, soft_wrap=True)
    return result.is_complete
