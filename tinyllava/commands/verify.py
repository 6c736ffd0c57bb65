"""`tinyllava doctor CHECKPOINT`: compare all files of a checkpoint with their recorded hashes, and say what is wrong.

It reads every file, also those that `load` compared before. CHECKPOINT can be a stage or a run: then all checkpoints in
it are read.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from rich.console import Console
from rich.markup import escape

from tinyllava.checkpoint import legacy, legacy_peft, read_record
from tinyllava.console import messages
from tinyllava.errors import UserError
from tinyllava.files import check_model_files, read_json
from tinyllava.find import NANO, download_checkpoint, locate_part
from tinyllava.hashes import ALGORITHM, FOR_PEOPLE, compare_again, list_damage
from tinyllava.record import accept_edits
from tinyllava.resume import OPTIMIZER_FILES, find_resume_fault
from tinyllava.runs import FINAL, NUMBERED, RECORD, read_run

MARKERS = (RECORD, "config.json", "adapter_config.json")  # one of them is in every checkpoint
LISTS = ("files", "training_state")  # in a record
LISTED = 8  # names of files that are not in the record


def verify_checkpoints(name: str, console: Console, accept: bool = False) -> bool:
    """Print the state of the checkpoint `name`, or of all in a stage or a run; returns whether none is damaged.

    name: as for `find_checkpoint`. accept: first record what the user has edited. Raises UserError if there is no
    checkpoint.
    """
    results = []
    for directory in find_checkpoints(name):
        if accept and (directory / RECORD).is_file():
            edits = ", ".join(accept_edits(directory)) or "nothing was edited"
            console.print(f"{directory}: accepted: {edits}", highlight=False, markup=False, soft_wrap=True)
        with messages.status(f"reading {escape(str(directory))}"):
            damage, facts = examine_checkpoint(directory)
        results.append(not damage)
        state = "[red]damaged[/]" if damage else "[green]whole[/]"
        console.print(f"{escape(str(directory))}: {state}", highlight=False, soft_wrap=True)
        for line in (*damage, *facts):
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    return all(results)


def find_checkpoints(name: str) -> list[Path]:
    """The checkpoint at a path, or all checkpoints in the folders below it: those of a stage or a run."""
    path = Path(locate_part("model", name)).expanduser()
    if not path.is_dir():
        path = download_checkpoint(name)
    if any((path / marker).exists() for marker in MARKERS):
        return [path]
    folders = {file.parent for marker in MARKERS for depth in ("*", "*/*") for file in path.glob(f"{depth}/{marker}")}
    if not folders:
        raise UserError(
            f"no checkpoint in {path}. Give a checkpoint, a stage, a run such as runs/quickstart, or {NANO}."
        )
    return sorted(folders, key=_to_sort_key)


def _to_sort_key(path: Path) -> tuple[Path, int, str]:
    """Checkpoints of a stage in the order of their steps, then `final`."""
    step = NUMBERED.fullmatch(path.name)
    return path.parent, int(step[1]) if step else 0 if path.name != FINAL else 1 << 62, path.name


def examine_checkpoint(directory: Path) -> tuple[list[str], list[str]]:
    """What is damaged in a checkpoint, and other facts about it, a line each."""
    try:
        record = read_json(directory / RECORD) if (directory / RECORD).exists() else None
        damage = [] if record is None else list(list_damage(directory, record, LISTS, compare_again))
        if not damage:
            check_model_files(directory)
            _check_kind(directory)
    except UserError as error:
        return [str(error)], []
    if record is None:
        return [], ["another program wrote it: its files can be read, and there are no hashes to compare"]
    return damage, list(_describe(directory, record, damage))


def _check_kind(directory: Path) -> None:
    """Raise UserError for what only `checkpoint.load` refuses, such as a record that was deleted."""
    if not legacy.is_legacy(directory) and not legacy_peft.stands_alone(directory):
        read_record(directory)


def _describe(directory: Path, record: Mapping[str, Any], damage: list[str]) -> Iterator[str]:
    lists = [files for name in LISTS if isinstance(files := record.get(name), dict)]
    recorded = {name: entry for files in lists for name, entry in files.items()}
    if not damage and record.get("format") == 1:
        yield f"an earlier version saved it: the sizes of {len(recorded)} files are right, and there are no hashes"
    elif not damage:
        yield f"{len(recorded)} files have their {ALGORITHM} hashes"
    if others := list_others(directory, recorded):
        more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
        yield f"not in its record: {', '.join(others[:LISTED])}{more}"
    yield explain_resume(directory, record)


def list_others(directory: Path, recorded: Mapping[str, Any]) -> list[str]:
    """Files and folders in a checkpoint that its record does not list, without hidden ones and the model card."""
    tops = {PurePath(name).parts[0] for name in recorded if PurePath(name).parts}
    names = (path.name + "/" * path.is_dir() for path in sorted(directory.iterdir()) if path.name not in tops)
    return [name for name in names if not name.startswith(".") and name not in (RECORD, *FOR_PEOPLE)]


def explain_resume(directory: Path, record: Mapping[str, Any]) -> str:
    """Whether training can resume from a checkpoint, and why not."""
    engines = [name for name, pattern in OPTIMIZER_FILES.items() if any(directory.glob(pattern))]
    shards = len(list(directory.glob("global_step*/*optim_states.pt")))
    if "training_state" not in record and not engines:
        return "it has no state of an optimiser: a stage can start from it, and training cannot resume from it"
    if not NUMBERED.fullmatch(directory.name):
        step = read_run(directory).get("step", "STEP")
        return f"training resumes only from folders with the name checkpoint-{step}"
    fault = find_resume_fault(directory, engines[0] if engines else "plain", shards or 1)
    return f"training cannot resume from it: {fault}" if fault else "training can resume from it"
