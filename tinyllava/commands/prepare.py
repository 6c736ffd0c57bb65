"""`tinyllava data prepare NAME ...`: get a dataset, or say where it is to be had; then look at what is there.

The checks are the same whether anything was fetched or not, so that without a network they still say what lacks.
"""

import logging
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape

from tinyllava.data.images import absent
from tinyllava.data.prepare import Dataset, load, names
from tinyllava.data.prepare.check import Found, Records, count, look
from tinyllava.data.prepare.fetch import NotFetched, Unreachable, fetch
from tinyllava.errors import UserError
from tinyllava.factory import Factory

logger = logging.getLogger("tinyllava")


def prepare(wanted: list[str], root: Path, download: bool, console: Console) -> bool:
    """Fetch (unless not `download`) and check the datasets called `wanted`; whether nothing lacks."""
    datasets = {name: load(name) for name in wanted}  # a mistaken name is told before the first of many gigabytes
    unreachable: dict[str, str] = {}
    if download:
        for dataset in datasets.values():
            get(dataset, root, unreachable)
    if unreachable:
        logger.warning(
            "no connection to %s (%s). What is there is checked all the same; run this again with a network, and it "
            "goes on from here",
            ", ".join(unreachable),
            next(iter(unreachable.values())),
        )
    reports = [report(name, dataset, root, console) for name, dataset in datasets.items()]
    return all(reports)


def show(console: Console) -> None:
    """The datasets that have a name."""
    for name in names():
        console.print(f"{name:12}{load(name).title}", highlight=False)


def get(dataset: Dataset, root: Path, unreachable: dict[str, str]) -> None:
    """Fetch what is not there and can be fetched; what goes wrong with one part is told, and the next one tried."""
    for part in dataset.parts:
        if part.page or look(part, root).good:
            continue
        host = "the Hub" if part.hub else urlsplit(part.url).hostname
        if host in unreachable:
            continue
        logger.info("fetching %s from %s", part.path, part.source)
        try:
            fetch(part, root)
        except Unreachable as error:
            unreachable[host] = str(error)
        except NotFetched as error:
            logger.warning("%s", error)


def report(name: str, dataset: Dataset, root: Path, console: Console) -> bool:
    """Show what is there of a dataset and what lacks; whether all that is needed is there."""
    console.print(f"[bold]{dataset.title}[/]  {dataset.page}", highlight=False, soft_wrap=True)
    console.print(f"licence: {dataset.licence}", highlight=False)
    if dataset.about:
        console.print(dataset.about, highlight=False)
    found = [look(part, root) for part in dataset.parts]
    width = max(len(one.part.path) for one in found)
    for one in found:
        mark, text = said(one)
        console.print(f"  {mark}  {escape(f'{one.part.path:{width}}  {text}')}", highlight=False, soft_wrap=True)
    good = all(one.good or one.part.optional for one in found)
    if dataset.kind == "benchmark":
        return questions(name, dataset, root, console, complain=good) and good
    for annotations in dataset.annotations:
        if (root / annotations.path).is_file():
            good &= show_records(count(dataset, annotations, root), console)
    return good


def said(found: Found) -> tuple[str, str]:
    """Whether a part is there, and what there is to know of it: for one that lacks, how it can be had."""
    part = found.part
    if found.good:
        return "[green]there[/]", found.text
    how = f"by hand, {part.how}: {part.page}" if part.page else f"from {part.source}"
    if part.optional:
        return "[dim]  no [/]", f"{how} (needed only for {part.optional})"
    return "[red]lacks[/]", f"{found.text}; {how}" if found.text else how


def questions(name: str, dataset: Dataset, root: Path, console: Console, complain: bool) -> bool:
    """Read a benchmark as `tinyllava eval` does, and look for its pictures. `complain` if it cannot be read."""
    try:
        asked = Factory("benchmarks").get(name).questions(root)
    except UserError as error:
        if complain:
            console.print(f"  [red]{escape(str(error))}[/]", highlight=False, soft_wrap=True)
        return False
    pictures = list(dict.fromkeys(image for question in asked for image in question.images))
    lacking = [error for picture in pictures if (error := absent(picture, ()))]
    text = f"{len(asked):,} questions on {len(pictures):,} pictures"
    if dataset.questions and len(asked) != dataset.questions:
        text += f" (the release has {dataset.questions:,} questions)"
    text += f"; {len(lacking):,} of them lack: {lacking[0]}" if lacking else ", all there"
    good = not lacking and len(asked) >= (dataset.questions or 0)
    console.print(f"  {escape(text)}", style="green" if good else "red", highlight=False, soft_wrap=True)
    return good


def show_records(result: Records, console: Console) -> bool:
    """What a training file holds, and per folder the pictures that it names and that lack."""
    expected = result.annotations
    counts = f"{result.records:,} records, {result.with_picture:,} with a picture"
    if not result.is_release:
        with_picture = "" if expected.with_picture is None else f", {expected.with_picture:,} with a picture"
        counts += f" (expected {expected.records:,}{with_picture}: another release?)"
    console.print(f"  {escape(f'{expected.path}: {result.fault or counts}')}", highlight=False, soft_wrap=True)
    for folder, pictures in sorted(result.folders.items()):
        lack = f"{pictures.lacking:,} lack, like {', '.join(pictures.examples)}" if pictures.lacking else "all there"
        text = escape(f"{folder}: {pictures.named:,} pictures, {lack}")
        console.print(f"    {text}", style="red" if pictures.lacking else "green", highlight=False, soft_wrap=True)
    return result.good
