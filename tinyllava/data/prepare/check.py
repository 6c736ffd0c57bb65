"""Check a dataset: which items are present or missing, and whether the images that training files name exist.

Each image folder is listed once and no image is opened, so 625,000 images take seconds.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import track

from tinyllava.console import messages
from tinyllava.data.prepare import Annotations, DatasetDescription, Item, count_shards, find_item
from tinyllava.data.prepare.fetch import hash_file
from tinyllava.errors import UserError
from tinyllava.json_records import parse_records

EXAMPLES = 3


@dataclass
class ItemStatus:
    """Whether an item is present and complete, and a text about it ("" if nothing is there)."""

    item: Item
    is_complete: bool
    text: str


@dataclass
class FolderCount:
    """The images of one folder that a training file names: how many, how many are missing, and which, for example."""

    images: int = 0
    missing: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class RecordCount:
    """What a training file holds. `fault` is the error that ended the reading early."""

    annotations: Annotations
    records: int = 0
    with_picture: int = 0
    folders: dict[str, FolderCount] = field(default_factory=dict)
    fault: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether the file is the publisher's and none of its images is missing."""
        return not self.fault and self.is_release and not any(folder.missing for folder in self.folders.values())

    @property
    def is_release(self) -> bool:
        """Whether it holds as many records as the publisher's file."""
        expected = self.annotations
        return self.records == expected.records and expected.with_picture in (None, self.with_picture)


def check_item(item: Item, root: Path) -> ItemStatus:
    """Check that an item is present and has the files and the checksum that its publisher states."""
    files = find_item(item, root)
    if not files:
        return ItemStatus(item, False, "")
    path = files[0]
    alternative = _name_alternative(item, path, root)
    if path.is_dir():
        with os.scandir(path) as entries:
            count = sum(1 for _ in entries)
        if item.files and not alternative and count < item.files:
            return ItemStatus(item, False, f"{count:,} files, expected {item.files:,}")
        return ItemStatus(item, count > 0, f"{count:,} entries{alternative}" if count else "empty")
    present, expected = count_shards(files)
    if present < expected:
        return ItemStatus(item, False, f"{present} of {expected} files")
    if item.sha256 and not alternative and hash_file(path) != item.sha256:
        return ItemStatus(item, False, "wrong checksum: the file is damaged, or another release")
    size = sum(file.stat().st_size for file in files)
    number = f"{len(files)} files, " if len(files) > 1 else ""
    return ItemStatus(item, size > 0, f"{number}{_format_size(size)}{alternative}")


def _name_alternative(item: Item, path: Path, root: Path) -> str:
    """Return the path in parentheses if it is one of the item's other forms, else ""."""
    return "" if path.match(str(root / item.path)) else f" ({path.relative_to(root)})"


def count_records(dataset: DatasetDescription, annotations: Annotations, root: Path) -> RecordCount:
    """Read a training file once, and check that its images exist."""
    result = RecordCount(annotations)
    images = os.path.normpath(root / annotations.images)
    # Longest first: an image counts for the innermost folder of the dataset that holds it.
    folders = sorted((item.path.rstrip("/") for item in dataset.items if item.is_folder), key=len, reverse=True)
    listed: dict[str, set[str]] = {}
    shown = {"console": messages, "transient": True, "disable": not messages.is_terminal}
    records = parse_records(root / annotations.path)
    try:
        for _, record in track(records, f"Records of {annotations.path}", total=annotations.records, **shown):
            result.records += 1
            names = _list_images(record)
            result.with_picture += bool(names)
            for name in names:
                path = os.path.normpath(os.path.join(images, name))
                inside = os.path.relpath(path, root)
                folder = next((f for f in folders if inside.startswith(f"{f}/")), os.path.dirname(inside))
                count = result.folders.setdefault(folder, FolderCount())
                count.images += 1
                if not _exists(path, listed):
                    count.missing += 1
                    count.examples += [inside] if len(count.examples) < EXAMPLES else []
    except UserError as error:
        result.fault = str(error)
    return result


def _list_images(record: Any) -> list[str]:
    images = (record.get("images") or record.get("image") or []) if isinstance(record, dict) else []
    return [images] if isinstance(images, str) else [name for name in images if isinstance(name, str)]


def _exists(path: str, listed: dict[str, set[str]]) -> bool:
    """Whether the file exists. `listed` keeps the names in each folder, so that each folder is listed once."""
    folder, name = os.path.split(path)
    if folder not in listed:
        listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return name in listed[folder]


def _format_size(size: float) -> str:
    """Format a number of bytes with decimal units: '2 bytes', '1.5 KB', '20.3 GB'."""
    if size < 1000:
        return f"{size} bytes"
    for unit in ("KB", "MB"):
        size /= 1000
        if size < 1000:
            return f"{size:.3g} {unit}"
    return f"{size / 1000:.1f} GB"
