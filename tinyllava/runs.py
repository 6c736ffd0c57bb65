"""A run's directory: what training writes there, and how to tell it from what the user puts beside it.

    runs/quickstart/  recipe.yaml  run.json  results.json  eval/
      finetune/  metrics.jsonl  curve.png  runs/  start/  checkpoint-500/  final/

Only these names are ours, and only if the record of a checkpoint agrees with its name. Everything else is ignored, and
never deleted: users copy, rename and link checkpoints.
"""

import json
import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinyllava import atomic
from tinyllava.errors import UserError
from tinyllava.hashes import RECORD, find_damage
from tinyllava.yaml_faults import parse_yaml

logger = logging.getLogger("tinyllava")
RUN, RECIPE, RESULTS = "run.json", "recipe.yaml", ("results.json", "eval")
LOCK = ".lock"  # held while the run trains (see locks.py)
REPLACED = ".replaced"  # what --overwrite replaces, until the new run has saved a checkpoint
METRICS, CURVE, START, FINAL, TENSORBOARD = "metrics.jsonl", "curve.png", "start", "final", "runs"
NUMBERED = re.compile(r"checkpoint-([1-9][0-9]*)")
REMEDY = "Choose another --output, or start again with --overwrite."


# -- checkpoints -------------------------------------------------------------------------------------------------------


def check_stage_name(name: str) -> str:
    """`name`, if it can be the folder of a stage. Raises ValueError if it is a path, hidden, or a name of ours."""
    if not re.fullmatch(r"\w[\w.+= -]{0,99}", name) or name in {RUN, RECIPE, *RESULTS}:
        raise ValueError(
            "the name of a stage is the name of its folder: use letters, digits, and `_`, `-`, `.`, and not the name of"
            f" a file of the run ({', '.join((RUN, RECIPE, *RESULTS))})"
        )
    return name


def list_checkpoints(stage: Path) -> list[Path]:
    """The numbered checkpoints of a stage, the newest first. Other names, files and links are the user's own."""
    found = stage.glob("checkpoint-*") if os.path.isdir(stage) else ()
    named = [path for path in found if NUMBERED.fullmatch(path.name)]
    return sorted((path for path in named if path.is_dir() and not path.is_symlink()), key=get_step, reverse=True)


def get_step(checkpoint: Path) -> int:
    """The step in the name of a numbered checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; {} if it is missing or damaged. A loss of power can leave an empty file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}  # a pipe would block
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What the record of a checkpoint says of the run that wrote it; {} if it says nothing."""
    run = read_json_or_empty(checkpoint / RECORD).get("run")
    return run if isinstance(run, dict) else {}


def is_ours(checkpoint: Path) -> bool:
    """Whether a run wrote `checkpoint` under this name. A damaged one is ours. A copy with another number is not."""
    if checkpoint.is_symlink() or not (checkpoint / RECORD).is_file():
        return False
    step = read_run(checkpoint).get("step")
    return step is None or not NUMBERED.fullmatch(checkpoint.name) or get_step(checkpoint) == step


def make_room(checkpoint: Path) -> None:
    """Set aside what the user has at the path of a checkpoint that will be written."""
    if not is_ours(checkpoint):
        atomic.set_aside(checkpoint)


def has_stopped_early(state: Any) -> bool:
    """Whether early stopping had ended the training when this TrainerState was saved."""
    saved = state.stateful_callbacks.get("EarlyStoppingCallback")
    if not isinstance(saved, dict):
        return False
    return saved["attributes"]["early_stopping_patience_counter"] >= saved["args"]["early_stopping_patience"]


def rotate_checkpoints(newest: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest checkpoints of a stage beyond `limit`, but not `newest`, and not the one with the name `best`.

    Later checkpoints than `newest` stay: they were skipped at the last resume. HF's own function would delete copies
    such as `checkpoint-2-keep`. The run that --overwrite has replaced is deleted too.
    """
    discard_replaced(newest.parent.parent)
    ours = [path for path in list_checkpoints(newest.parent) if is_ours(path) and get_step(path) <= get_step(newest)]
    old = [path for path in ours if path.name not in (newest.name, best)]
    surplus = min(len(old), len(ours) - limit) if limit and limit > 0 else 0
    for path in old[len(old) - max(0, surplus) :]:
        shutil.rmtree(path, ignore_errors=True)


# -- the whole run -----------------------------------------------------------------------------------------------------


def read_begun_stages(directory: Path) -> list[dict[str, Any]]:
    """What the newest whole checkpoint of each stage says of the run. It is `finished` if that is the final one."""
    begun = []
    for folder in directory.glob("*/"):
        for path in filter(is_ours, (folder / FINAL, *list_checkpoints(folder))):
            record, run = read_json_or_empty(path / RECORD), read_run(path)
            is_whole = find_damage(path, record.get("files")) is None
            if is_whole and run.get("stage") == folder.name and "recipe_yaml" in run:
                begun.append(run | ({"finished": True, "steps": run.get("step")} if path.name == FINAL else {}))
                break
    return begun


def read_start(directory: Path) -> list[dict[str, Any]]:
    """The run in `run.json` and `recipe.yaml`, as of its last stage; [] if there is none.

    For a run without checkpoints: another process may be training it, so one of another recipe is refused here too.
    """
    run = read_json_or_empty(directory / RUN)
    if not {"stages", "versions"} <= run.keys() or not (directory / RECIPE).is_file():
        return []
    text = (directory / RECIPE).read_text(encoding="utf-8", errors="replace")
    try:
        recipe = parse_yaml(text, RECIPE)
    except UserError:
        return []
    is_recipe = isinstance(recipe, dict) and isinstance(recipe.get("stages"), dict)
    return [{**run, "recipe_yaml": text, "stage": list(recipe["stages"])[-1]}] if is_recipe else []


def read_stage_names(directory: Path) -> list[str]:
    """The stages in `run.json`, in order; [] if there is no such file. Raises UserError if it is damaged."""
    stages = read_json_or_empty(directory / RUN).get("stages")
    if (directory / RUN).is_file() and not isinstance(stages, dict):
        raise UserError(
            f"{directory / RUN} is damaged. `tinyllava train` writes it again. Or give a stage of the run, such as"
            f" {directory}/finetune."
        )
    return list(stages or ())


def check_is_run(directory: Path) -> None:
    """Raise UserError if a directory has content, but not that of a run."""
    if not directory.exists() or (directory / RUN).is_file():
        return
    if any(path.name not in (LOCK, REPLACED) for path in directory.iterdir()):
        raise UserError(
            f"{directory} is not a run: it has no {RUN}. --overwrite deletes only runs. Choose another --output."
        )


def list_written(directory: Path) -> list[Path]:
    """What a run wrote into a directory. Everything else is the user's, such as copies of checkpoints."""
    recorded = read_json_or_empty(directory / RUN).get("stages")
    stages = {run["stage"] for run in read_begun_stages(directory)} | set(
        recorded if isinstance(recorded, dict) else ()
    )
    written: list[Path] = []
    for stage in (folder for folder in directory.glob("*/") if folder.name in stages):
        written += [path for path in (*list_checkpoints(stage), stage / FINAL, stage / START) if is_ours(path)]
        written += [stage / name for name in (METRICS, CURVE, TENSORBOARD)] + list_leftovers(stage)
    written += [directory / name for name in (RECIPE, *RESULTS, RUN)]  # RUN is the last: it completes what is moved
    return [path for path in written if os.path.lexists(path)]


def list_leftovers(stage: Path) -> list[Path]:
    """What a process that was killed left of the files and checkpoints of a stage that it was writing."""
    names = {*(f".{name}.partial" for name in (METRICS, CURVE, START, FINAL))}
    hidden = re.compile(rf"\.({NUMBERED.pattern}|{START}|{FINAL})\.(partial|replaced)")
    return [path for path in stage.glob(".*") if path.name in names or hidden.fullmatch(path.name)]


def clear_leftovers(directory: Path) -> None:
    """Delete what a process that was killed had not finished, and give what it was replacing its name back."""
    for path in (path for stage in directory.glob("*/") for path in list_leftovers(stage)):
        if path.name.endswith(".replaced"):
            atomic.recover(path.with_name(path.name[1:].removesuffix(".replaced")))
        else:
            atomic.remove(path)


def set_run_aside(directory: Path) -> None:
    """Move what a run wrote into REPLACED. Everything else stays.

    If a whole run is there already, the last start with --overwrite failed before its first checkpoint. The old run
    then stays there, and what the failed start wrote is deleted.
    """
    aside, written = directory / REPLACED, list_written(directory)
    if (aside / RUN).is_file() and not any(is_ours(path) for path in written):
        for path in written:
            atomic.remove(path)
    elif written:
        if (aside / RUN).is_file():
            atomic.remove(aside)
        for path in written:
            target = aside / path.relative_to(directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic.remove(target)
            path.rename(target)
    if aside.is_dir():
        logger.info("the old run is in %s until the new one has saved a checkpoint", aside)
    for stage in {path.parent for path in written} - {directory}:
        with suppress(OSError):  # something else is left in it
            stage.rmdir()


def discard_replaced(directory: Path) -> None:
    """Delete the run that --overwrite has replaced: the new one has saved a checkpoint."""
    atomic.remove(directory / REPLACED)
