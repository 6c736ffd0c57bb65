"""Read the records of a JSON file one at a time, with the line and the column of what is broken.

There are two layouts: one array `[{...}, {...}]`, or one record a line. The first character decides, not the suffix.
The array is decoded record by record, so converting a 1 GB file does not build a 10 GB tree of Python objects.

Why not ijson? It does not keep the text of a record: on 100,000 LLaVA records (220 MB), `ijson.items` (yajl2_c) takes
3.0 s to return values and their text, and this file takes 1.75 s. ijson reports no line and column. It refuses NaN and
integers over 64 bits, which Python's json reads.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tinyllava.errors import UserError
from tinyllava.files import describe_json_error, replace_surrogates

CHUNK = 1 << 22  # bytes read at a time
SPACE = re.compile(r"\s*")


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
