"""Convert JSON annotation files to Arrow, once. Every worker then maps the file, and none holds its records in memory.

There are two layouts: one array `[{...}, {...}]`, or one record a line. The first character decides, not the suffix.
The array is decoded record by record, so converting a 1 GB file does not build a 10 GB tree of Python objects.

Why not ijson? It does not keep the text of a record: on 100,000 LLaVA records (220 MB), `ijson.items` (yajl2_c) takes
3.0 s to return values and their text, and this file takes 1.75 s. ijson reports no line and column. It refuses NaN and
integers over 64 bits, which Python's json reads.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa

from tinyllava import atomic
from tinyllava.cache import digest, open_entry
from tinyllava.config import DataSpec
from tinyllava.data.sample import Sample
from tinyllava.data.sources.source import Source, format_id, list_image_folders, map_tables
from tinyllava.errors import UserError
from tinyllava.files import describe_json_error, replace_surrogates

CHUNK = 1 << 22  # bytes read at a time
BATCH = 1000  # records in an Arrow batch
FIRST = 20  # records that decide the format of a file: the first one alone may be bad
SCHEMA = pa.schema([("id", pa.string()), ("record", pa.string())])
SPACE = re.compile(r"\s*")
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


def parse_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(JSON text, value) of each record, one at a time. Raises UserError for an empty or broken file."""
    with path.open("rb") as stream:
        head = stream.read(CHUNK).lstrip(codecs.BOM_UTF8).lstrip()
        stream.seek(0)
        if not head:
            raise UserError(f"{path} is empty. Expected an array of records, or one JSON record a line.")
        parse = _parse_array if head.startswith(b"[") else _parse_lines
        try:
            for text, value in parse(path, stream):
                yield replace_surrogates(text, value)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason}). Expected JSON or JSON lines.") from None


def _parse_lines(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, 1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if not text:
            continue
        try:
            yield text, json.loads(text)
        except (ValueError, RecursionError) as error:
            expected = "one JSON record a line, or an array [{...}, ...]"
            column, fault = getattr(error, "colno", 1), getattr(error, "msg", None) or describe_json_error(error)
            raise _explain_broken(path, (number, column), fault, expected) from None


def _parse_array(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    cursor = _Cursor(path, stream)
    cursor.expect("[")
    separator = ""  # before the first record
    while cursor.peek() != "]":
        if separator:
            cursor.expect(separator)
        yield cursor.decode()
        separator = ","
    cursor.expect("]")
    if cursor.peek():
        raise cursor.explain("Extra data after the array", cursor.at)


class _Cursor:
    """Walks over a JSON text that is read in pieces."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream = path, stream
        self.utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self.json = json.JSONDecoder()
        self.text, self.at = "", 0
        self.line, self.column = 1, 1  # of text[0]
        self.ended = False

    def read_on(self) -> None:
        """Drop the text that was decoded, then read on: at least as much as is left, so that huge records stay fast."""
        self.line, self.column = self.locate(self.at)
        rest = self.text[self.at :]
        chunk = self.stream.read(max(CHUNK, len(rest)))
        self.ended = not chunk
        self.text, self.at = rest + self.utf8.decode(chunk, final=self.ended), 0

    def peek(self) -> str:
        """The next character that is not white space, or '' at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read_on()

    def expect(self, character: str) -> None:
        """Step over `character`, or raise UserError if another one is next."""
        if self.peek() != character:
            raise self.explain(f"Expecting '{character}'", self.at)
        self.at += 1

    def decode(self) -> tuple[str, Any]:
        """(JSON text, value) of the record that begins here."""
        self.peek()
        last_fault = None
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.at)
                text, self.at = self.text[self.at : end], end
                return text, value
            except json.JSONDecodeError as error:
                # The piece may end inside the record, or the record may be broken. It is broken if the same fault
                # remains at the same place after reading on. Only an unterminated string may still end later.
                fault = (error.msg, error.pos - self.at)
                if self.ended or (fault == last_fault and not error.msg.startswith("Unterminated")):
                    raise self.explain(error.msg, error.pos) from None
                last_fault = fault
                self.read_on()
            except (ValueError, RecursionError) as error:
                raise self.explain(describe_json_error(error), self.at) from None

    def locate(self, at: int) -> tuple[int, int]:
        """Line and column in the file of text[at]."""
        newlines = self.text.count("\n", 0, at)
        if not newlines:
            return self.line, self.column + at
        return self.line + newlines, at - self.text.rfind("\n", 0, at)

    def explain(self, message: str, at: int) -> UserError:
        return _explain_broken(self.path, self.locate(at), message, "an array of records [{...}, ...]")


def _explain_broken(path: Path, place: tuple[int, int], message: str, expected: str) -> UserError:
    line, column = place
    return UserError(f"{path} is not valid JSON: {message} at line {line}, column {column}. Expected {expected}.")
