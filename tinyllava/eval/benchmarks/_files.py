"""Read JSON files. Every error names the file."""

import json
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError


def read_json_file(path: Path) -> Any:
    """Read the JSON document in `path`. Raises UserError if it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the records of a JSON-lines file; blank lines are skipped. Raises UserError for a line that is not JSON."""
    records = []
    # In bytes, because str.splitlines would also split at U+2028, which a JSON text may contain.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}.") from None
    return records


def read_json_if_whole(path: Path) -> Any:
    """The document in a file that is one JSON document; None for a folder, JSON lines and anything else."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
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
