"""`tinyllava.json`, the record of a checkpoint: its model, the run that made it, and all files with their sizes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllava.checkpoint.weight_files import INDEX
from tinyllava.errors import UserError
from tinyllava.files import read_json
from tinyllava.runs import RECORD, find_damage

WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
FORMAT = 1  # of the record; reading a newer one raises an error


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the record. It lists all files with their sizes, so it must be the last file that is written."""
    _write({**record, "files": measure_files(directory)}, directory)


def add_training_state(directory: Path) -> None:
    """List the files that the trainer added to a checkpoint. They are needed to resume, but not to load the model."""
    record = read_json(directory / RECORD)
    added = {name: size for name, size in measure_files(directory).items() if name not in record["files"]}
    _write({**record, "training_state": added}, directory)


def measure_files(directory: Path) -> dict[str, int]:
    """{name: bytes} of all files in a checkpoint, without the record."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file() and path != directory / RECORD)
    return {str(path.relative_to(directory)): path.stat().st_size for path in paths}


def _write(record: Mapping[str, Any], directory: Path) -> None:
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a checkpoint that `save` wrote; None for checkpoints of other packages.

    Raises UserError when the directory is not a checkpoint, or files of it are missing or damaged.
    """
    if not (directory / "config.json").exists():
        raise UserError(
            f"{directory} is not a checkpoint: it has no config.json. Give one, such as runs/mine/finetune/final."
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
    if not version or not isinstance(files, dict) or not isinstance(model, dict) or "connector" not in model:
        raise UserError(f"{directory / RECORD} is not the record of a checkpoint. Copy it again.")
    if damage := find_damage(directory, files):
        raise UserError(f"{directory} is damaged: {damage}. Use an earlier checkpoint, or copy it again.")
    return record


def is_whole(directory: Path) -> bool:
    """Whether `save` wrote this directory and all its files are there with their sizes."""
    try:
        return directory.is_dir() and read_record(directory) is not None
    except UserError:
        return False
