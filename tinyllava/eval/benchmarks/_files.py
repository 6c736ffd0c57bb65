"""Where a release's files lie, and how they are read: one place for "which file was expected where"."""

import json
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError


def find(root: str | Path, folder: str, *names: str) -> Path | None:
    """The first of `names` that exists under ROOT, ROOT/FOLDER or ROOT/eval/FOLDER (roots of several benchmarks)."""
    places = [Path(root), Path(root) / folder, Path(root) / "eval" / folder]
    return next((place / name for name in names for place in places if (place / name).exists()), None)


def need(root: str | Path, folder: str, *names: str, hint: str = "") -> Path:
    """Like `find`, but a missing file is a UserError that says what was expected where.

    `names` may hold patterns of the Hub's parquet files (see `_hub`), which are only ever named here.
    """
    path = find(root, folder, *names)
    if path is None:
        places = f"{Path(root)}, {Path(root) / folder} or {Path(root) / 'eval' / folder}"
        raise UserError(f"expected {' or '.join(names)} in {places}, and found none.{' ' + hint if hint else ''}")
    return path


def remedy(task: str) -> str:
    """What to do about a benchmark's missing files."""
    return f"`tinyllava data prepare {task}` gets it, or says where it is to be had."


def read_json(path: Path) -> Any:
    """The JSON document in `path`."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; blank lines are skipped."""
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}.") from None
    return records


def field_of(record: dict[str, Any], name: str, path: Path) -> Any:
    """`record[name]`, or a UserError that names the file and what the record has instead."""
    if not isinstance(record, dict) or name not in record:
        has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{path}: a record has no '{name}' (it has {has}). Is this file of the expected release?")
    return record[name]
