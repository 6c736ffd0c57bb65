"""Find the checkpoint that a stage resumes from: the newest one that is whole, with everything that training needs."""

import logging
import lzma
import struct
import zipfile
import zlib
from pathlib import Path

from tinyllava.errors import UserError
from tinyllava.files import check_safetensors
from tinyllava.hashes import RECORD, list_damage
from tinyllava.runs import REMEDY, get_step, is_ours, list_checkpoints, read_json_or_empty

logger = logging.getLogger("tinyllava")
# Where the optimiser's state is in a checkpoint, by the engine that wrote it.
OPTIMIZER_FILES = {"plain": "optimizer.pt", "deepspeed": "global_step*", "fsdp": "optimizer[_.][0b]*"}
UNIVERSAL = "latest_universal"  # names the converted state beside it
UNREADABLE = (ValueError, RuntimeError, EOFError, LookupError)  # what zipfile raises for a damaged directory of files
LARGE = 1 << 30  # bytes; reading smaller files takes a second


def find_resume_fault(checkpoint: Path, engine: str, world_size: int) -> str | None:
    """Why training cannot resume exactly from a checkpoint; None if it can.

    engine: the key of OPTIMIZER_FILES. world_size: the number of processes.
    """
    record = read_json_or_empty(checkpoint / RECORD)
    if not record:
        return f"{RECORD} is {'damaged' if (checkpoint / RECORD).is_file() else 'missing'}"
    if damage := next(list_damage(checkpoint, record, ("files", "training_state")), None):
        return damage
    states = [path.name for pattern in OPTIMIZER_FILES.values() for path in checkpoint.glob(pattern)]
    if not states:
        return f"{OPTIMIZER_FILES[engine]} is missing. `save_only_model: true` saves no optimiser state"
    if not list(checkpoint.glob(OPTIMIZER_FILES[engine])):
        return f"the optimiser state {states[0]} is of another engine. Resume with the engine that wrote it"
    if fault := find_shard_fault(checkpoint, world_size):
        return fault
    for pattern in (OPTIMIZER_FILES[engine], "rng_state*.pth", *([] if engine == "deepspeed" else ["scheduler.pt"])):
        files = list(checkpoint.glob(pattern))
        # The records of earlier versions do not list the sizes of these.
        if not files or not all(path.is_dir() or is_whole_zip(path) for path in files):
            return f"{pattern.replace('*', '')} is {'damaged' if files else 'missing'}"
    for path in checkpoint.glob("*.safetensors"):
        try:
            check_safetensors(path)
        except UserError:  # after a loss of power, a file can have its size but no content
            return f"{path.name} is damaged"
    state = read_json_or_empty(checkpoint / "trainer_state.json")
    return None if state.get("global_step") == get_step(checkpoint) else "trainer_state.json is missing or damaged"


def find_shard_fault(checkpoint: Path, world_size: int) -> str | None:
    """Why DeepSpeed cannot load its optimiser state in `world_size` processes; None if it can.

    DeepSpeed converts a state to its universal form, which any number of processes can load. Its conversion of ZeRO-3
    (version 0.19.8) gives other steps than those of an undisturbed run, so only ZeRO-2 is converted.
    """
    shards = list(checkpoint.glob("global_step*/*optim_states.pt"))
    if len(shards) in (0, world_size):
        return None
    remedy = f"the optimiser state is of {len(shards)} processes, not {world_size}. Resume with {len(shards)}"
    folder = shards[0].parent
    if list(folder.glob("zero_pp_rank_*_model_states.pt")):  # the weights are sharded too: ZeRO-3
        return remedy
    if (checkpoint / UNIVERSAL).is_file():
        return None
    command = "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state"
    return f"{remedy}, or first run `{command} --input_folder {folder} --output_folder {folder}_universal`"


def find_last_checkpoint(output: Path, engine: str, world_size: int) -> Path | None:
    """The newest checkpoint of a stage that training can resume from exactly; None if it has no checkpoints.

    engine: the key of OPTIMIZER_FILES. Raises UserError if it has checkpoints, but none can be resumed from.
    """
    faults = []
    for path in list_checkpoints(output):
        is_lost = not (path / RECORD).is_file() and (path / "trainer_state.json").is_file()  # its record was deleted
        if not is_lost and not is_ours(path):
            continue
        fault = find_resume_fault(path, engine, world_size)
        if fault is None:
            for skipped in faults:
                logger.warning("stage %s: skipped %s", output.name, skipped)
            return path
        faults.append(f"{path.name}: {fault}.")
    if faults:
        raise UserError(
            f"stage {output.name} cannot resume. {faults[0]} {REMEDY} `model: {{checkpoint: DIR}}` starts another run"
            " from the weights of a checkpoint."
        )
    return None


def is_whole_zip(path: Path) -> bool:
    """Whether a file that torch wrote, which is a zip file, is whole. Of a large file only its end is read."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return path.stat().st_size > LARGE or archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, *UNREADABLE):
        return False
