"""Read the files of benchmarks and results. Every error names the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.files import parse_json


@contextmanager
def explain_form(what: str, remedy: str) -> Iterator[None]:
    """Turn what Python raises for a value of another form, such as a number in place of a list, into a UserError.

    For code that reads files which others wrote, field by field. `--debug` shows the original error.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{what} does not have the expected form: {reason[:200]}. {remedy}") from error


def read_text_file(path: Path) -> str:
    """Read a text file. Raises UserError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from None


def read_json_file(path: Path) -> Any:
    """Read the JSON document in `path`. Raises UserError if it is not JSON."""
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the records of a JSON-lines file; blank lines are skipped. Raises UserError for a line that is no record."""
    records = []
    # In bytes, because str.splitlines would also split at U+2028, which a JSON text may contain.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                records.append(parse_json(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}.") from None
            if not isinstance(records[-1], dict):
                raise UserError(f"{path}, line {number} is not a record like {{...}}: {line[:80]!r}.")
    return records


def read_json_if_whole(path: Path) -> Any:
    """The document in a file that is one JSON document; None for a folder, JSON lines and anything else."""
    try:
        return parse_json(path.read_bytes()) if path.is_file() else None
    except ValueError:
        return None


def get_field(record: dict[str, Any], name: str, path: Path) -> Any:
    """Return `record[name]`. The UserError for a missing field names the file and the fields of the record."""
    if not isinstance(record, dict) or name not in record:
        fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(
            f"{path}: a record has no '{name}' (it has {fields}). Check that the file is of the expected release."
        )
    return record[name]
