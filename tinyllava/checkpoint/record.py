"""`tinyllava.json`, the record of a checkpoint: its model, the run that made it, and all files with their sizes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllava.checkpoint.weight_files import INDEX
from tinyllava.errors import UserError
from tinyllava.files import read_json

RECORD = "tinyllava.json"
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
FORMAT = 1  # of the record; reading a newer one raises an error


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the record. It lists all files with their sizes, so it must be the last file that is written."""
    sizes = {
        str(path.relative_to(directory)): path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()
    }
    sizes.pop(RECORD, None)
    (directory / RECORD).write_text(json.dumps({**record, "files": sizes}, indent=2) + "\n", encoding="utf-8")


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a checkpoint that `save` wrote; None for checkpoints of other packages.

    Raises UserError when the directory is not a checkpoint, or files of it are missing or damaged.
    """
    if not (directory / "config.json").exists():
        raise UserError(
            f"{directory} is not a checkpoint: it has no config.json. Give a directory made by `tinyllava train`."
        )
    if not (directory / RECORD).exists():
        if any((directory / name).exists() for name in WEIGHTS):
            return None
        raise UserError(
            f"{directory} is incomplete: it has a config.json but no weights. Looked for {', '.join(WEIGHTS)}."
            " Use an earlier checkpoint, or copy it again."
        )
    record = read_json(directory / RECORD)
    version, files, model = (record.get(name) for name in ("format", "files", "model"))
    if isinstance(version, int) and version > FORMAT:
        raise UserError(
            f"{directory} was written by a newer version of tinyllava (format {version}). Update tinyllava."
        )
    if not version or not isinstance(files, dict) or "connector" not in (model or ()):
        raise UserError(f"{directory / RECORD} is not the record of a checkpoint. Copy it again.")
    for name, size in files.items():
        actual = (directory / name).stat().st_size if (directory / name).is_file() else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual} bytes, expected {size}"
            raise UserError(f"{directory} is damaged: {name} {state}. Use an earlier checkpoint, or copy it again.")
    return record


def is_whole(directory: Path) -> bool:
    """Whether `save` wrote this directory and all its files are there with their sizes."""
    try:
        return directory.is_dir() and read_record(directory) is not None
    except UserError:
        return False
