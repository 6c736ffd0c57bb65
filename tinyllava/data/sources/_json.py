"""Convert JSON annotation files to Arrow, once. Every worker then maps the file, and none holds its records in memory.

`tinyllava/json_records.py` reads the records.
"""

import codecs
import hashlib
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from tinyllava import atomic
from tinyllava.cache import digest, open_entry
from tinyllava.config import DataSpec
from tinyllava.data.sample import Sample
from tinyllava.data.sources.source import Source, format_id, list_image_folders, map_tables
from tinyllava.errors import UserError
from tinyllava.json_records import parse_records

BATCH = 1000  # records in an Arrow batch
FIRST = 20  # records that decide the format of a file: the first one alone may be bad
SCHEMA = pa.schema([("id", pa.string()), ("record", pa.string())])
SUFFIXES = (".json", ".jsonl", ".ndjson")


def has_key(path: str, key: str) -> bool:
    """Whether `path` is a JSON file whose first records have `key`."""
    values = (value for _, value in islice(parse_records(Path(path)), FIRST))
    return is_json(path) and any(key in value for value in values if isinstance(value, dict))


def is_json(path: str) -> bool:
    """Whether `path` is a JSON file: by its suffix, else by its first character."""
    file = Path(path)
    if not file.is_file():
        return False
    if file.suffix.lower() in SUFFIXES:
        return True
    with file.open("rb") as stream:
        return stream.read(64).lstrip(codecs.BOM_UTF8).lstrip()[:1] in (b"[", b"{")


def check_exists(path: Path) -> None:
    """Raise UserError if there is no such data file."""
    if not path.is_file():
        raise UserError(f"data file {path} not found. Check `path:`; relative paths start at {Path.cwd()}.")


def open_json(spec: DataSpec, cache: Path, to_sample: Callable[[dict[str, Any]], Sample]) -> Source:
    """The records {id, record} of a JSON file, where `record` is the JSON text. The fingerprint is the file's SHA-256.

    The file is converted again when its path, size or modification time changes. Raises UserError with line and column
    for broken JSON.
    """
    path = Path(spec.path)
    check_exists(path)
    stat = path.stat()
    key = digest("json", str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    target = cache / "records" / f"{path.stem}-{key}.arrow"
    content, records = open_entry(target, str(path), partial(_convert, path, target), _read_arrow)
    roots = list_image_folders(spec, [str(path.parent)])
    return Source(spec.path, records, to_sample, roots, content, content, mapped_stream=spec.streaming)


def _read_arrow(files: list[Path]) -> tuple[str, datasets.Dataset]:
    with pa.OSFile(str(files[0]), "rb") as stream:
        content = pa.ipc.open_stream(stream).schema.metadata[b"sha256"].decode()
    return content, map_tables(files).with_format("arrow")


def _convert(path: Path, target: Path) -> list[Path]:
    """Write the records of `path` to the Arrow file `target`, with the hash of the file in its schema."""
    with path.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    schema = SCHEMA.with_metadata({"sha256": content})
    rows = ((format_id(value, row), text) for row, (text, value) in enumerate(parse_records(path)))
    with (
        atomic.write_file(target) as written,
        pa.OSFile(str(written), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        while batch := list(islice(rows, BATCH)):
            ids, texts = zip(*batch, strict=True)
            writer.write_batch(pa.record_batch([list(ids), list(texts)], schema=schema))
    return [target]
