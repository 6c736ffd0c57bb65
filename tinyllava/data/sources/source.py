"""Source: the records of one data file or table, and functions that all formats use to convert them to Samples."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from tinyllava.config import DataSpec
from tinyllava.data.sample import Sample, SampleError
from tinyllava.errors import WorkerError

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
    mapped_stream: bool = False  # a table that is read as a stream: its records are not tokenised in advance

    @property
    def streaming(self) -> bool:
        return self.mapped_stream or isinstance(self.records, datasets.IterableDataset)

    def __len__(self) -> int:
        return len(self.records)

    def get_record(self, row: int) -> dict[str, Any]:
        """The raw record of this row. Its images are not decoded."""
        return to_raw_records(self.records[row], row)[0]

    def count_shards(self) -> int:
        """The parts of a stream that can be read alone. A table has any: a power of 2, with 64 records or more each."""
        if self.mapped_stream:
            return 1 << min(10, max(0, (len(self) // TABLE_ROWS).bit_length() - 1))
        return self.records.num_shards

    def iterate_shard(self, shard: int, start: int = 0) -> Iterator[pa.Table | dict[str, Any]]:
        """The raw rows of a shard of a stream, from row `start` on. Nothing of a row is converted yet."""
        try:
            for batch in self._iterate_batches(shard):
                is_table = isinstance(batch, pa.Table)
                rows = len(batch) if is_table else len(next(iter(batch.values())))
                for row in range(min(start, rows), rows):
                    yield batch.slice(row, 1) if is_table else {name: cells[row] for name, cells in batch.items()}
                start = max(0, start - rows)
        except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:200]
            raise WorkerError(f"{self.path} cannot be read (shard {shard}): {reason}. Copy it again.") from None

    def _iterate_batches(self, shard: int) -> Iterator[pa.Table | dict[str, list]]:
        if not self.mapped_stream:
            # `datasets` would split a stream again in a worker process, except in `iter`.
            yield from self.records.shard(self.records.num_shards, shard).iter(TABLE_ROWS)
            return
        first, end = (len(self) * edge // self.count_shards() for edge in (shard, shard + 1))
        yield from (self.records[at : min(at + TABLE_ROWS, end)] for at in range(first, end, TABLE_ROWS))

    def to_record(self, raw: pa.Table | dict[str, Any], shard: int, row: int) -> dict[str, Any]:
        """The raw record of a raw row of a stream. Without an `id` it gets `#ROW`, or `#SHARD.ROW` of several."""
        record = raw.to_pylist()[0] if isinstance(raw, pa.Table) else raw
        return add_id(record, f"{shard}.{row}" if self.count_shards() > 1 else row)

    def iterate(self) -> Iterator[dict[str, Any]]:
        """All raw records in order, once. A record without an `id` gets `#ROW`."""
        if self.streaming:
            for shard in range(self.count_shards()):
                for row, raw in enumerate(self.iterate_shard(shard)):
                    yield self.to_record(raw, shard, row)
            return
        for start in range(0, len(self), TABLE_ROWS):
            yield from to_raw_records(self.records[start : start + TABLE_ROWS], start)

    def iterate_samples(self) -> Iterator[Sample]:
        """All samples in order. Bad records are left out: `build_dataset` and `data check` report them."""
        for record in self.iterate():
            with suppress(SampleError):
                yield self.to_sample(record)


def map_tables(files: list[Path]) -> datasets.Dataset:
    """Arrow files of the cache as one table. It is memory-mapped: no process reads it whole."""
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])


def to_raw_records(table: pa.Table, start: int = 0) -> list[dict[str, Any]]:
    """The rows of an Arrow table as dicts with an `id`. Reading Arrow directly leaves images undecoded."""
    return [add_id(record, start + offset) for offset, record in enumerate(table.to_pylist())]


def add_id(record: dict[str, Any], row: int | str) -> dict[str, Any]:
    """The record with its `id` as text, or `#ROW` where it has none."""
    return {**record, "id": format_id(record, row)}


def format_id(record: Any, row: int | str) -> str:
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
