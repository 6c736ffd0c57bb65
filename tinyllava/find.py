"""Find what a path or a name stands for: a checkpoint, a part that comes with the package, or a model on the Hub."""

import logging
import os
import re
import reprlib
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import snapshot_download
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

from tinyllava.errors import UserError
from tinyllava.record import RECORD, read_record
from tinyllava.runs import FINAL, list_checkpoints, read_stage_names

logger = logging.getLogger("tinyllava")
PART_FOLDERS = {"tokenizer": "llm"}  # folders of nano/ that differ from the part's name
# Parts and a trained model that come with the package (docs/nano.md): nano/vision_tower, nano/llm, nano/model.
NANO = "nano"
NANO_FOLDER = Path(__file__).parent / NANO


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
    if any(os.path.lexists(path / name) for name in ("config.json", "adapter_config.json", RECORD)):
        return path
    if os.path.lexists(path / "adapter" / "adapter_config.json"):  # written by `export --to adapter`
        return path / "adapter"
    folders = [path / stage for stage in reversed(read_stage_names(path))] or [path]
    places = [place for folder in folders for place in (folder / FINAL, *list_checkpoints(folder))]
    for place in filter(os.path.isdir, places):
        try:
            read_record(place)
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


def locate_part(part: str, name: str) -> str:
    """Where to load the part `name` from: for `nano` a folder of the package, else `name` (`./nano` is your folder)."""
    return str(NANO_FOLDER / PART_FOLDERS.get(part, part)) if name == NANO else name


@cache
def is_hub_reachable() -> bool:
    """Whether the Hub can be reached. Without this check, every file costs half a minute of retries when offline."""
    if HF_HUB_OFFLINE:
        return False
    try:
        hub = urlsplit(ENDPOINT)
        socket.create_connection((hub.hostname, hub.port or 443), timeout=5).close()
    except OSError:
        # Behind a proxy, only the proxy can reach the Hub.
        return bool(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"))
    return True
