"""Find the checkpoint for a path or a name, and the device for a name."""

import logging
import os
import re
import reprlib
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

from tinyllava import checkpoint
from tinyllava.errors import UserError
from tinyllava.model.parts import DTYPES, NANO, is_hub_reachable, locate_part
from tinyllava.runs import FINAL, list_checkpoints, read_stage_names

logger = logging.getLogger("tinyllava")


def find_checkpoint(path: str | Path) -> Path:
    """The directory of the checkpoint at `path`.

    path: a checkpoint; a stage (its final or newest checkpoint); a run (that of its last stage); the output of
    `export --to adapter`; a model on the Hub; or the string `nano`, the model of the package. Incomplete
    checkpoints are skipped. Raises UserError, with the places searched, when there is none.
    """
    if path == NANO:  # only the string: Path("nano") is a folder of the user's
        return Path(locate_part("model", NANO))
    if not isinstance(path, str | Path):
        raise UserError(f"expected the path of a checkpoint, found {reprlib.repr(path)}.")
    name, path = str(path), Path(os.path.expanduser(path))
    if not os.path.isdir(path):
        return download_checkpoint(name)
    if any(os.path.lexists(path / name) for name in ("config.json", "adapter_config.json")):
        return path
    if os.path.lexists(path / "adapter" / "adapter_config.json"):  # written by `export --to adapter`
        return path / "adapter"
    folders = [path / stage for stage in reversed(read_stage_names(path))] or [path]
    places = [place for folder in folders for place in (folder / FINAL, *list_checkpoints(folder))]
    for place in filter(os.path.isdir, places):
        try:
            checkpoint.read_record(place)
            return place
        except UserError as error:
            logger.warning("skipped: %s", error)
    looked = ", ".join(f"{folder}/final, {folder}/checkpoint-N" for folder in folders)
    raise UserError(f"no complete checkpoint in {path}. Looked for {path}/config.json, {looked}.")


def download_checkpoint(name: str) -> Path:
    """Download the Hub's model USER/NAME, once. Raises UserError when there is none."""
    remedy = "Give a checkpoint, a run such as runs/quickstart, a model on the Hub as USER/NAME, or nano."
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name} is not a directory. {remedy}")
    try:
        return Path(snapshot_download(name, local_files_only=not is_hub_reachable()))
    except (HTTPError, HFValidationError, LocalEntryNotFoundError):
        where = "is not on the Hub, or is private" if is_hub_reachable() else "the Hub cannot be reached"
        raise UserError(f"{name} is not a directory, not in the Hub's cache, and {where}. {remedy}") from None


def find_device(name: str | torch.device | None) -> torch.device:
    """The device `name`. By default the accelerator (with torchrun, one for each process), else the CPU."""
    default = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    known = sorted({"cpu", default.type})
    kind, _, index = str(name or default).partition(":")
    if kind not in known or not (index or "0").isdigit():
        raise UserError(f"no device '{name}' on this machine. It has: {', '.join(known)}.")
    if name is None and default.type != "cpu" and "LOCAL_RANK" in os.environ:
        return torch.device(default.type, int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
    return torch.device(name or default)


def find_dtype(name: str | torch.dtype) -> str | torch.dtype:
    """The dtype `name`, or auto. Raises UserError for anything that weights cannot have."""
    if not getattr(name, "is_floating_point", isinstance(name, str) and name in DTYPES):
        raise UserError(f"unknown dtype '{name}'. Known: {', '.join(DTYPES)}.")
    return DTYPES.get(name, name)
