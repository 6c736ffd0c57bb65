"""Which checkpoint a path means, and which device a name means."""

import json
import logging
import os
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

from tinyllava.errors import UserError
from tinyllava.model import checkpoint
from tinyllava.model.parts import NANO, hub_answers, located

logger = logging.getLogger("tinyllava")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself; a stage's final, else newest one; a run's last stage's; the Hub's; or
    the one that comes with the package, `nano` (a string: a Path of that name, and "./nano", are a folder).

    Half-written ones do not count. Raises UserError, with what was looked for, when there is none.
    """
    if path == NANO:
        return Path(located("model", NANO))
    name, path = str(path), Path(path).expanduser()
    if not path.is_dir():
        return from_hub(name)
    if (path / "config.json").is_file():
        return path
    run = path / "run.json"
    stages = json.loads(run.read_text(encoding="utf-8"))["stages"] if run.is_file() else {}
    folders = [path / stage for stage in reversed(list(stages))] or [path]
    for folder in folders:
        numbered = sorted(folder.glob("checkpoint-*[0-9]"), key=lambda p: int(p.name.split("-")[-1]), reverse=True)
        whole = next((candidate for candidate in [folder / "final", *numbered] if _is_whole(candidate)), None)
        if whole:
            return whole
    looked = ", ".join(f"{folder}/final, {folder}/checkpoint-N" for folder in folders)
    raise UserError(f"there is no whole checkpoint in {path}: looked for {path}/config.json, {looked}.")


def from_hub(name: str) -> Path:
    """The checkpoint that the Hub has under USER/NAME, downloaded once. Raises UserError when there is none."""
    remedy = "Give a checkpoint, a run such as runs/quickstart, USER/NAME of a model on the Hub, or nano."
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name} is no directory. {remedy}")
    try:
        return Path(snapshot_download(name, local_files_only=not hub_answers()))
    except (HTTPError, HFValidationError, LocalEntryNotFoundError):
        where = "is not on the Hub, or is private" if hub_answers() else "the Hub cannot be reached"
        raise UserError(f"{name} is no directory, not in the Hub's cache, and {where}. {remedy}") from None


def _is_whole(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    try:
        checkpoint.read_record(directory)
    except UserError as error:
        logger.warning("passed over: %s", error)
        return False
    return True


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of this name; by default the accelerator, under torchrun one for each process, else the CPU."""
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    known = sorted({"cpu", best.type})
    if str(name or best).partition(":")[0] not in known:
        raise UserError(f"no device '{name}' on this machine. It has: {', '.join(known)}.")
    if name is None and best.type != "cpu" and "LOCAL_RANK" in os.environ:
        return torch.device(best.type, int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
    return torch.device(name or best)
