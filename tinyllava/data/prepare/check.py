"""What is there of a dataset, what lacks, and whether the pictures that training files name lie where they should.

625,000 pictures are looked for in seconds: each folder is listed once, and no file is opened.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import track

from tinyllava.console import messages
from tinyllava.data.prepare import Annotations, Dataset, Part, find, shards
from tinyllava.data.prepare.fetch import sha256_of
from tinyllava.data.sources._json import json_records
from tinyllava.errors import UserError

EXAMPLES = 3


@dataclass
class Found:
    """One part: whether it will do, and what is to be said of it."""

    part: Part
    good: bool
    text: str


@dataclass
class Pictures:
    """The pictures of one folder that a training file names: how many, how many of them lack, and a few of those."""

    named: int = 0
    lacking: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Records:
    """What a training file holds. `fault` says why it could not be read to its end."""

    annotations: Annotations
    records: int = 0
    with_picture: int = 0
    folders: dict[str, Pictures] = field(default_factory=dict)
    fault: str = ""

    @property
    def good(self) -> bool:
        return not self.fault and self.is_release and not any(one.lacking for one in self.folders.values())

    @property
    def is_release(self) -> bool:
        """Whether it holds as many records as its publisher's."""
        expected = self.annotations
        return self.records == expected.records and expected.with_picture in (None, self.with_picture)


def look(part: Part, root: Path) -> Found:
    """Whether a part is there, and what its publisher says of it holds."""
    found = find(part, root)
    if not found:
        return Found(part, False, "")
    path = found[0]
    if path.is_dir():
        with os.scandir(path) as entries:
            count = sum(1 for _ in entries)
        if part.files and not instead(part, path, root) and count < part.files:
            return Found(part, False, f"{count:,} files, expected {part.files:,}")
        return Found(part, count > 0, f"{count:,} entries{instead(part, path, root)}" if count else "empty")
    there, expected = shards(found)
    if there < expected:
        return Found(part, False, f"{there} of {expected} files")
    if part.sha256 and not instead(part, path, root) and sha256_of(path) != part.sha256:
        return Found(part, False, "another checksum than its publisher's: damaged, or another release")
    size = sum(one.stat().st_size for one in found)
    files = f"{len(found)} files, " if len(found) > 1 else ""
    return Found(part, size > 0, f"{files}{_bytes(size)}{instead(part, path, root)}")


def instead(part: Part, path: Path, root: Path) -> str:
    """What is there in the place of a part, if it is not the part itself."""
    return "" if path.match(str(root / part.path)) else f" ({path.relative_to(root)})"


def count(dataset: Dataset, annotations: Annotations, root: Path) -> Records:
    """Read a training file once, and look for its pictures."""
    result, listed = Records(annotations), {}
    images = os.path.normpath(root / annotations.images)
    folders = sorted((part.path.rstrip("/") for part in dataset.parts if part.is_folder), key=len, reverse=True)
    shown = {"console": messages, "transient": True, "disable": not messages.is_terminal}
    records = json_records(root / annotations.path)
    try:
        for _, record in track(records, f"Records of {annotations.path}", total=annotations.records, **shown):
            result.records += 1
            names = _pictures(record)
            result.with_picture += bool(names)
            for name in names:
                path = os.path.normpath(os.path.join(images, name))
                inside = os.path.relpath(path, root)
                folder = next((one for one in folders if inside.startswith(f"{one}/")), os.path.dirname(inside))
                seen = result.folders.setdefault(folder, Pictures())
                seen.named += 1
                if not _is_there(path, listed):
                    seen.lacking += 1
                    seen.examples += [inside] if len(seen.examples) < EXAMPLES else []
    except UserError as error:
        result.fault = str(error)
    return result


def _pictures(record: Any) -> list[str]:
    found = (record.get("images") or record.get("image") or []) if isinstance(record, dict) else []
    return [found] if isinstance(found, str) else [name for name in found if isinstance(name, str)]


def _is_there(path: str, listed: dict[str, set[str]]) -> bool:
    folder, name = os.path.split(path)
    if folder not in listed:
        listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return name in listed[folder]


def _bytes(size: int) -> str:
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size} bytes"
        size /= 1000
    return f"{size:.1f} GB"
