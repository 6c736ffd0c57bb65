"""JSON annotation files -> Arrow, once. A file of a million records is then mapped by every worker and held by none.

Two layouts, told apart by the first character and not by the suffix: one array `[{...}, {...}]`, or one record a line.
The array is decoded record by record, so converting a 1 GB file does not build a 10 GB tree of Python objects.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa

from tinyllava.config import DataSpec
from tinyllava.data.cache import digest, locked
from tinyllava.errors import UserError

CHUNK = 1 << 22
BATCH = 1000  # records in an Arrow batch: what reading one record touches at most
SCHEMA = pa.schema([("id", pa.string()), ("record", pa.string())])
SPACE = re.compile(r"\s*")
SUFFIXES = (".json", ".jsonl", ".ndjson")


def is_json(path: str) -> bool:
    """A file, and not one of a binary format under the wrong name."""
    file = Path(path)
    if not file.is_file():
        return False
    if file.suffix.lower() in SUFFIXES:
        return True
    with file.open("rb") as stream:
        return stream.read(64).lstrip(codecs.BOM_UTF8).lstrip()[:1] in (b"[", b"{")


def read_json(spec: DataSpec, cache: Path) -> tuple[datasets.Dataset | datasets.IterableDataset, str]:
    """Records {id, record} of a JSON or JSONL file and the SHA-256 of the file; `record` is the JSON text.

    Converted again when path, size or modification time change. Raises UserError with line and column for broken JSON.
    """
    path = Path(spec.path)
    if not path.is_file():
        raise UserError(f"data file {path} not found. Check `path:`; relative paths start at {Path.cwd()}.")
    stat = path.stat()
    key = digest("json", str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    target = cache / "records" / f"{path.stem}-{key}.arrow"
    with locked(target):
        if not target.exists():
            _convert(path, target)
    with pa.OSFile(str(target), "rb") as stream:
        content = pa.ipc.open_stream(stream).schema.metadata[b"sha256"].decode()
    records = datasets.Dataset.from_file(str(target))
    return records.to_iterable_dataset() if spec.streaming else records.with_format("arrow"), content


def _convert(path: Path, target: Path) -> None:
    with path.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    partial = target.with_suffix(f".{os.getpid()}.partial")
    try:
        schema = SCHEMA.with_metadata({"sha256": content})
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            ids: list[str] = []
            texts: list[str] = []
            for row, (text, value) in enumerate(json_records(path)):
                identity = value.get("id") if isinstance(value, dict) else None
                ids.append(f"#{row}" if identity is None or identity == "" else str(identity))
                texts.append(text)
                if len(ids) == BATCH:
                    writer.write_batch(pa.record_batch([ids, texts], schema=schema))
                    ids, texts = [], []
            if ids:
                writer.write_batch(pa.record_batch([ids, texts], schema=schema))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(JSON text, value) of each record, one at a time. Raises UserError for an empty or broken file."""
    with path.open("rb") as stream:
        head = stream.read(CHUNK).lstrip(codecs.BOM_UTF8).lstrip()
        stream.seek(0)
        if not head:
            raise UserError(f"{path} is empty. Expected an array of records, or one JSON record a line.")
        try:
            for text, value in _array(path, stream) if head.startswith(b"[") else _lines(path, stream):
                yield _clean(text, value)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason}). Expected JSON or JSON lines.") from None


def _lines(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, 1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if not text:
            continue
        try:
            yield text, json.loads(text)
        except json.JSONDecodeError as error:
            expected = "one JSON record a line, or an array [{...}, ...]"
            raise _broken(path, number, error.colno, error.msg, expected) from None


def _array(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
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
        raise cursor.broken("Extra data after the array")


class _Cursor:
    """Walks over a JSON text that is read in pieces."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream = path, stream
        self.utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self.json = json.JSONDecoder()
        self.text, self.at = "", 0
        self.line, self.column = 1, 1  # of text[0]
        self.ended = False

    def more(self) -> None:
        """Drop what has been read, then at least double what lies ahead (so a huge record costs no quadratic time)."""
        self.line, self.column = self.where(self.at)
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
            self.more()

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise self.broken(f"Expecting '{character}'")
        self.at += 1

    def decode(self) -> tuple[str, Any]:
        self.peek()
        fault = None
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.at)
                text, self.at = self.text[self.at : end], end
                return text, value
            except json.JSONDecodeError as error:
                # Cut off by the end of the piece, or really broken? The same fault at the same place after reading on
                # is real; only an unterminated string may still end further on.
                again = (error.msg, error.pos - self.at)
                if self.ended or (again == fault and not error.msg.startswith("Unterminated")):
                    raise self.broken(error.msg, error.pos) from None
                fault = again
                self.more()

    def where(self, at: int) -> tuple[int, int]:
        newlines = self.text.count("\n", 0, at)
        if not newlines:
            return self.line, self.column + at
        return self.line + newlines, at - self.text.rfind("\n", 0, at)

    def broken(self, message: str, at: int | None = None) -> UserError:
        return _broken(
            self.path, *self.where(self.at if at is None else at), message, "an array of records [{...}, ...]"
        )


def _broken(path: Path, line: int, column: int, message: str, expected: str) -> UserError:
    return UserError(f"{path} is not valid JSON: {message} at line {line}, column {column}. Expected {expected}.")


def _clean(text: str, value: Any) -> tuple[str, Any]:
    r"""Half an emoji (a lone `\ud83d`, from text cut by a careless tool) is legal JSON, but no tokenizer takes it."""
    if "\\ud" not in text and "\\uD" not in text:
        return text, value
    text = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text, json.loads(text)
