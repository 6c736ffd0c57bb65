"""`tinyllava.json`, the record of a checkpoint: its model, the run that made it, and all files with their hashes."""

import json
import logging
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinyllava import atomic
from tinyllava.errors import UserError
from tinyllava.files import read_json
from tinyllava.hashes import find_edits, hash_directory, is_editable, is_sealed, list_damage, seal
from tinyllava.runs import RECORD

logger = logging.getLogger("tinyllava")
INDEX = "model.safetensors.index.json"  # of the weight files of all parts
WEIGHT_FILES = {"vision_tower": "vision_tower", "connector": "connector", "llm": "language_model"}  # begins of names
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
FORMAT = 2  # of the record; reading a newer one raises an error. Format 1 has the sizes of files instead of hashes


def write_record(directory: Path, record: Mapping[str, Any], sources: Iterable[Path] = ()) -> None:
    """Write the record. It lists all files with their hashes, so it must be the last file that is written.

    sources: files of earlier checkpoints that can be linked here. Their hashes are known.
    """
    _write({**record, "files": hash_directory(directory, sources)}, directory)


def add_training_state(directory: Path) -> None:
    """List the files that the trainer added to a checkpoint. They are needed to resume, but not to load the model."""
    record = read_json(directory / RECORD)
    _write({**record, "training_state": hash_directory(directory, skipped=record["files"])}, directory)


def _write(record: Mapping[str, Any], directory: Path) -> None:
    (directory / RECORD).write_text(seal(record), encoding="utf-8")


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a checkpoint that `save` wrote; None for checkpoints of other packages.

    Raises UserError when the directory is not a checkpoint, or files of it are missing or damaged.
    """
    if (directory / RECORD).exists():
        return check_record(directory)
    if any(find_part_files(directory).values()):  # no other package writes files of these names
        raise UserError(f"{directory} is damaged: {RECORD} is missing. Use an earlier checkpoint, or copy it again.")
    if not (directory / "config.json").exists():
        raise UserError(
            f"{directory} is not a checkpoint: it has no config.json. Give one, such as runs/mine/finetune/final."
        )
    if any((directory / name).exists() for name in WEIGHTS):
        return None
    raise UserError(
        f"{directory} is incomplete: it has a config.json but no weights. Looked for {', '.join(WEIGHTS)}."
        " Use an earlier checkpoint, or copy it again."
    )


def check_record(directory: Path) -> dict[str, Any]:
    """The record of a checkpoint or of an adapter. Raises UserError unless all its files are as they were saved."""
    record = read_json(directory / RECORD)
    version = record.get("format")
    has_form = all(isinstance(record.get(name, {}), dict) for name in ("files", "model", "template", "run"))
    if isinstance(version, int) and version > FORMAT:
        raise UserError(
            f"{directory} was written by a newer version of tinyllava (format {version}). Update tinyllava."
        )
    if version not in (1, FORMAT) or not has_form or "connector" not in record.get("model", ()):
        raise UserError(f"{directory / RECORD} is not the record of a checkpoint. Copy it again.")
    if damage := next(list_damage(directory, record), None):
        is_edit = is_editable(damage.partition(" ")[0]) and is_sealed(directory / RECORD, record)
        edit = f" If you edited it, run `tinyllava doctor {shlex.quote(str(directory))} --accept`." if is_edit else ""
        raise UserError(f"{directory} is damaged: {damage}. Use an earlier checkpoint, or copy it again.{edit}")
    return record


def accept_edits(directory: Path) -> list[str]:
    """Record the settings of a checkpoint that its owner has edited as they are now. Returns the names of the files.

    Only files that people edit: damage of weights stays damage. Raises UserError for a record that has changed, and for
    a file that is no JSON.
    """
    record = read_json(directory / RECORD)
    if not is_sealed(directory / RECORD, record):
        raise UserError(f"{directory / RECORD} has changed since it was written. Copy the checkpoint again.")
    edits = find_edits(directory, record)
    for name in (name for name in edits if name.endswith(".json")):
        read_json(directory / name)
    if edits:
        changed = {**record, "files": {**record["files"], **edits}}
        text = json.dumps(changed, indent=2) + "\n" if record.get("format") == 1 else seal(changed)
        atomic.write_text(directory / RECORD, text)
    return list(edits)


def is_whole(directory: Path) -> bool:
    """Whether `save` wrote this directory and all its files are as they were saved. It logs why not."""
    try:
        return directory.is_dir() and read_record(directory) is not None
    except UserError as error:
        logger.warning("skipped: %s", error)
        return False


def find_part_files(directory: Path) -> dict[str, list[Path]]:
    """The weight files of each part in a checkpoint that `save` wrote."""
    return {part: sorted(directory.glob(f"{stem}*.safetensors")) for part, stem in WEIGHT_FILES.items()}
