"""Source: the records of one data file or table, and functions that all formats use to convert them to Samples."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa

from tinyllava.config import DataSpec
from tinyllava.data.sample import Sample, SampleError

SHUFFLED = 1000  # records of a stream in the shuffle buffer: with their encoded images, about a hundred MB at most
TABLE_ROWS = 64  # rows that become Python objects at the same time: they may contain images


@dataclass
class Source:
    """The records of a DataSpec. `fingerprint` hashes their content, for the run's record. `key` names their caches."""

    path: str
    records: datasets.Dataset | datasets.IterableDataset
    to_sample: Callable[[dict[str, Any]], Sample]
    roots: list[str]  # folders in which images are searched, in this order
    fingerprint: str
    key: str

    @property
    def streaming(self) -> bool:
        return isinstance(self.records, datasets.IterableDataset)

    def __len__(self) -> int:
        return len(self.records)

    def get_record(self, row: int) -> dict[str, Any]:
        """The raw record of this row. Its images are not decoded."""
        return to_raw_records(self.records[row], row)[0]

    def iterate(self, seed: int | None = None) -> Iterator[dict[str, Any]]:
        """All raw records in order. A record without an `id` gets `#ROW`.

        With a `seed` a stream is shuffled, the same way every time: its shards, and its records in a buffer.
        """
        if self.streaming:
            records = self.records if seed is None else self.records.shuffle(seed, buffer_size=SHUFFLED)
            # `datasets` shuffles with another seed in a worker process, except in `iter`: workers must change nothing.
            for row, batch in enumerate(records.iter(batch_size=1)):
                yield add_id({name: column[0] for name, column in batch.items()}, row)
            return
        for start in range(0, len(self), TABLE_ROWS):
            yield from to_raw_records(self.records[start : start + TABLE_ROWS], start)

    def iterate_samples(self) -> Iterator[Sample]:
        """All samples in order. Bad records are left out: `build_dataset` and `data check` report them."""
        for record in self.iterate():
            with suppress(SampleError):
                yield self.to_sample(record)


def to_raw_records(table: pa.Table, start: int = 0) -> list[dict[str, Any]]:
    """The rows of an Arrow table as dicts with an `id`. Reading Arrow directly leaves images undecoded."""
    return [add_id(record, start + offset) for offset, record in enumerate(table.to_pylist())]


def add_id(record: dict[str, Any], row: int) -> dict[str, Any]:
    """The record with its `id` as text, or `#ROW` where it has none."""
    return {**record, "id": format_id(record, row)}


def format_id(record: Any, row: int) -> str:
    """The id of a record as text, or `#ROW` where it has none."""
    identity = record.get("id") if isinstance(record, dict) else None
    return f"#{row}" if identity is None or identity == "" else str(identity)


def unpack(record: dict[str, Any]) -> dict[str, Any]:
    """A raw record as its author wrote it. Records of JSON files are kept as text, those of tables as columns.

    Arrow columns must have one type. In a JSON file, an image may be a string in one record and a list in the next.
    """
    if not isinstance(record.get("record"), str):
        return _to_rows(record)
    value = json.loads(record["record"])
    if not isinstance(value, dict):
        text = f"expected a record like {{...}}, found {record['record'][:40]}"
        raise SampleError("no_conversation", text, record["id"])
    return {**value, "id": record["id"]}


def list_image_folders(spec: DataSpec, default: list[str]) -> list[str]:
    """The image folders of `spec` as a list, `default` where it names none."""
    if spec.images is None:
        return default
    return [spec.images] if isinstance(spec.images, str) else spec.images


def _to_rows(value: Any) -> Any:
    """Convert dicts of lists back to lists of dicts, at any depth: older Hub tables keep them like this."""
    if isinstance(value, list):
        return [_to_rows(item) for item in value]
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [_to_rows(dict(zip(value, cells, strict=False))) for cells in zip(*value.values(), strict=False)]
    return {key: _to_rows(item) for key, item in value.items()} if isinstance(value, dict) else value
