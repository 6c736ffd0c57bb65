"""Sources: from a path to raw records, and from a raw record to a Sample. One file is one format.

A format is a module with three functions (a recipe may name its own as `format: my_package.my_module`):

    matches(path: str) -> bool                       # is this path mine, judged by its content?
    read(spec, cache_dir: Path) -> Source            # open it
    to_sample(record: dict) -> Sample                # raises SampleError

`read(spec)` below asks the formats in turn. Records are memory-mapped Arrow (or a stream): no worker holds them.
"""

import importlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from tinyllava.config import DataSpec
from tinyllava.data.cache import cache_root
from tinyllava.data.sample import Sample, SampleError
from tinyllava.errors import UserError
from tinyllava.factory import nearest

FORMATS = ("stamps", "hub", "llava_json", "messages")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHUFFLED = 1000  # records of a stream held at a time, pictures encoded: a hundred MB at most


@dataclass
class Source:
    """The records of a DataSpec. `fingerprint` is of their content, for the run's record; `key` names their caches."""

    path: str
    records: datasets.Dataset | datasets.IterableDataset
    to_sample: Callable[[dict[str, Any]], Sample]
    roots: list[str]  # folders in which pictures are looked for, in this order
    fingerprint: str
    key: str

    @property
    def streaming(self) -> bool:
        return isinstance(self.records, datasets.IterableDataset)

    def __len__(self) -> int:
        return len(self.records)

    def record(self, row: int) -> dict[str, Any]:
        """Raw record number `row`; pictures stay undecoded."""
        return rows_of(self.records[row], row)[0]

    def iterate(self, seed: int | None = None) -> Iterator[dict[str, Any]]:
        """All raw records in order; each has an `id`, if only `#ROW`.

        With a `seed` a stream comes shuffled, always alike: its shards, and within them a buffer of records.
        """
        if self.streaming:
            records = self.records if seed is None else self.records.shuffle(seed, buffer_size=SHUFFLED)
            for row, record in enumerate(records):
                yield with_id(record, row)
            return
        for start in range(0, len(self), 64):
            yield from rows_of(self.records[start : start + 64], start)

    def samples(self) -> Iterator[Sample]:
        """All samples in order, but for records that none can be made of: `build_dataset` and `check` report those."""
        for record in self.iterate():
            with suppress(SampleError):
                yield self.to_sample(record)


def read(spec: DataSpec, cache_dir: str | Path | None = None) -> Source:
    """Open the source that `spec` names. Raises UserError for what is missing, empty, broken or of no known format."""
    try:
        source = _format(spec).read(spec, cache_root(cache_dir))
    except PermissionError as error:
        raise UserError(f"{error.filename or spec.path} may not be read: permission denied.") from None
    for root in source.roots:
        if not Path(root).is_dir():
            raise UserError(
                f"image folder {root} of {spec.path} does not exist. Set `images:` to the folder it lies in."
            )
    if not source.streaming and len(source) == 0:
        raise UserError(f"{spec.path} holds no records.")
    return source


def _format(spec: DataSpec) -> Any:
    if spec.format:
        if "." in spec.format:
            try:
                return importlib.import_module(spec.format)
            except ModuleNotFoundError as error:
                raise UserError(f"format {spec.format} of {spec.path} cannot be imported: {error}.") from None
        if spec.format not in FORMATS:
            raise UserError(
                f"unknown data format '{spec.format}'{nearest(spec.format, list(FORMATS))} Known: {', '.join(FORMATS)}."
            )
        return importlib.import_module(f"{__name__}.{spec.format}")
    for name in FORMATS:
        module = importlib.import_module(f"{__name__}.{name}")
        if module.matches(spec.path):
            return module
    from tinyllava.data.sources._json import json_records

    path = Path(spec.path)
    if not path.exists():
        raise UserError(f"data file {path} not found. Check `path:`; relative paths start at {Path.cwd()}.")
    if next(json_records(path), None) is None:
        raise UserError(f"{path} holds no records.")
    raise UserError(
        f"{path}: the first records have neither 'conversations' (LLaVA) nor 'messages'. Expected "
        '[{"id": ..., "image": ..., "conversations": [{"from": "human", "value": ...}, ...]}, ...]; or set `format:`.'
    )


def rows_of(table: Any, start: int = 0) -> list[dict[str, Any]]:
    """The rows of an Arrow table as plain dicts with an `id`. Reading Arrow directly leaves pictures undecoded."""
    return [with_id(record, start + offset) for offset, record in enumerate(table.to_pylist())]


def with_id(record: dict[str, Any], row: int) -> dict[str, Any]:
    identity = record.get("id")
    return {**record, "id": f"#{row}" if identity is None or identity == "" else str(identity)}


def unpack(record: dict[str, Any]) -> dict[str, Any]:
    """A raw record as the author wrote it: JSON files are kept as one text a record, tables as columns.

    Records of a JSON file need not agree (image a string here, a list there; ids as numbers); Arrow columns must.
    """
    if not isinstance(record.get("record"), str):
        return zipped(record)
    value = json.loads(record["record"])
    if not isinstance(value, dict):
        text = f"expected a record like {{...}}, found {record['record'][:40]}"
        raise SampleError("no_conversation", text, record["id"])
    return {**value, "id": record["id"]}


def zipped(value: Any) -> Any:
    """Older Hub tables keep a list of dicts as a dict of lists; this turns it back, at any depth."""
    if isinstance(value, list):
        return [zipped(item) for item in value]
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [zipped(dict(zip(value, cells, strict=False))) for cells in zip(*value.values(), strict=False)]
    return {key: zipped(item) for key, item in value.items()} if isinstance(value, dict) else value


def images_of(record: dict[str, Any]) -> list[Any]:
    """The pictures under `images` or `image`, without the nulls that tables hold where there is none."""
    found = record.get("images") or record.get("image")
    return [image for image in (found if isinstance(found, list) else [found]) if image]


def roots_of(spec: DataSpec, default: list[str] | None = None) -> list[str]:
    """The image folders of `spec` as a list."""
    if spec.images is None:
        return default or []
    return [spec.images] if isinstance(spec.images, str) else list(spec.images)


def keys_of(records: Iterator[Any], first: int = 20) -> set[str]:
    """The keys that the first few records have; a bad first record must not decide what a file is."""
    return {key for record in islice(records, first) if isinstance(record, dict) for key in record}
