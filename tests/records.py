"""Change the record of a checkpoint, as other versions or other people could."""

import json
from pathlib import Path
from typing import Any

from tinyllava.hashes import ALGORITHM, hash_directory, seal


def read(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "tinyllava.json").read_text())


def write_earlier(directory: Path, *without: str) -> None:
    """The record as versions before hashes wrote it: the sizes of the files that are there now. It knows no damage."""
    record = {name: value for name, value in read(directory).items() if name not in (ALGORITHM, *without)}
    for name in {"files", "training_state"} & record.keys():
        present = [directory / file for file in record[name]]
        record[name] = {str(path.relative_to(directory)): path.stat().st_size for path in present if path.is_file()}
    (directory / "tinyllava.json").write_text(json.dumps({**record, "format": 1}))


def write_again(directory: Path) -> None:
    """The record of the files that are there now, with their hashes."""
    record = read(directory)
    old = {**record["files"], **record.get("training_state", {})}
    for name in {"files", "training_state"} & record.keys():
        skipped = old.keys() - record[name].keys()
        record[name] = hash_directory(directory, skipped=skipped)
    (directory / "tinyllava.json").write_text(seal(record))
