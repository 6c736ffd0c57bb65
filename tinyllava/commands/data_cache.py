"""`tinyllava data cache`: what the cache of prepared data holds, how large it is, and what can go."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tinyllava import atomic
from tinyllava.cache import find_cache_root, is_in_use, read_description
from tinyllava.console import output
from tinyllava.files import is_inside

UNUSED = 30  # days after which an entry is pruned
LEFTOVER = 24 * 3600  # seconds: a partial file that is younger may still be written
DESCRIBED = ("records", "tokenised", "datasets")  # folders of entries that a KEY.json describes
FOLDERS = ("stamps", "gguf")  # each folder in these is an entry
# The names of what we write: [NAME-]KEY.arrow or tiny-v1-seed0, hidden while they are partial. TINYLLAVA_CACHE may name
# the home, or a folder with `datasets` of the user's own: nothing else is listed or deleted.
OURS = re.compile(r"\.?(.+-)?[0-9a-f]{16}([._].*)?|\.?[a-z]+-v\d+-seed\d+.*")


@dataclass
class CacheEntry:
    """An entry of the cache: the files that belong together, and what is known about them."""

    path: Path  # its description, or its folder
    kind: str
    source: str
    files: list[Path]
    used: float  # when it was used last, in seconds since 1970
    state: str = ""  # "in use", "damaged", "left over", or that it was not used for long
    is_pruned: bool = False

    @property
    def size(self) -> int:
        return sum(file.stat().st_size for file in self.files if file.is_file())


def show_cache(
    prune: Annotated[
        bool, typer.Option("--prune", help=f"Delete what is damaged, left over, or was not used for {UNUSED} days.")
    ] = False,
) -> None:
    """List the cache of prepared data: its entries, their size, when they were used, and where they are from."""
    root = find_cache_root()
    entries = sorted(list_entries(root), key=lambda entry: -entry.used)
    table = Table("entry", "from", "size", "last used", "state", box=None, pad_edge=False)
    for entry in entries:
        day = time.strftime("%Y-%m-%d", time.localtime(entry.used))
        table.add_row(entry.kind, escape(entry.source), format_size(entry.size), day, entry.state)
    if entries:
        output.print(table)
    pruned = [entry for entry in entries if entry.is_pruned]
    output.print(
        f"{root}: {len(entries)} entries, {format_size(sum(entry.size for entry in entries))}",
        highlight=False,
        markup=False,
    )
    size = format_size(sum(entry.size for entry in pruned))
    if prune:
        for entry in pruned:
            remove_entry(entry)
        output.print(f"deleted {len(pruned)} entries, {size}", highlight=False)
    elif pruned:
        output.print(f"`tinyllava data cache --prune` deletes {len(pruned)} of them, {size}", highlight=False)


def list_entries(root: Path) -> Iterator[CacheEntry]:
    """All entries of the cache, and the files that belong to none."""
    known: set[Path] = set()
    for kind in DESCRIBED:
        for path in (root / kind).glob("*.json"):
            if not OURS.fullmatch(path.name):
                continue
            described = read_description(path)
            if not all(map(is_inside, described.get("files", ()))):  # which names files that are not of the cache
                described = {}
            files = [path, *(path.parent / name for name in described.get("files", ()))]
            files += [file for file in path.parent.glob(f"{path.stem}[._]*") if file.suffix != ".lock"]
            known |= set(files := sorted(set(files)))
            source = described["source"][-30:] if described else "?"
            yield judge_entry(CacheEntry(path, kind, source, files, path.stat().st_mtime), not described)
    for kind in FOLDERS:
        for path in (root / kind).glob("[!.]*"):
            if path.is_dir() and OURS.fullmatch(path.name):
                known |= set(files := list(path.rglob("*")))
                yield judge_entry(CacheEntry(path, kind, path.name, files, path.stat().st_mtime))
    for path in sorted(path for kind in (*DESCRIBED, *FOLDERS) for path in (root / kind).rglob("*")):
        is_small = path.suffix in (".lock", ".json")  # `datasets` keeps small files beside its tables
        if path.is_file() and path not in known and not is_small and is_of_cache(path, root):
            used = path.stat().st_mtime
            is_old = time.time() - used > LEFTOVER
            state = "left over" if is_old else "not described"
            yield CacheEntry(path, path.relative_to(root).parts[0], path.name, [path], used, state, is_old)


def is_of_cache(path: Path, root: Path) -> bool:
    """Whether we, or `datasets` for us, wrote a file in a folder of the cache."""
    kind, *names = path.relative_to(root).parts
    if kind != "datasets":
        return bool(OURS.fullmatch(names[0]))
    # NAME/CONFIG-KEY/VERSION/KEY/TABLE.arrow, and in KEY.incomplete while it is written
    is_table = path.suffix == ".arrow" or path.parent.suffix == ".incomplete"
    return is_table and any(map(OURS.fullmatch, names))


def judge_entry(entry: CacheEntry, is_damaged: bool = False) -> CacheEntry:
    """The entry with its state, and whether it is pruned."""
    days = int((time.time() - entry.used) / (24 * 3600))
    if is_in_use(entry.path):
        entry.state = "in use"
    elif is_damaged:
        entry.state, entry.is_pruned = "damaged", True
    elif days >= UNUSED:
        entry.state, entry.is_pruned = f"not used for {days} days", True
    return entry


def remove_entry(entry: CacheEntry) -> None:
    """Delete the files of an entry, unless a process has begun to use it since it was listed."""
    if is_in_use(entry.path):
        return
    if entry.kind in FOLDERS:
        atomic.remove(entry.path)
    else:
        for file in entry.files:
            file.unlink(missing_ok=True)


def format_size(size: int) -> str:
    """`12.3 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
