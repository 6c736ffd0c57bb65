"""The record of a run, `run.json`: what made its weights. Every checkpoint has a copy in its own record.

A run resumes by the records of its checkpoints. `run.json` and `recipe.yaml` are for people, and are written again at
every start.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from tinyllava import atomic
from tinyllava.config import Recipe
from tinyllava.config.read import parse_recipe
from tinyllava.console import is_main_process
from tinyllava.identity import check_same_run
from tinyllava.provenance import get_git_state, get_versions
from tinyllava.runs import RECIPE, RUN, read_begun_stages, read_start
from tinyllava.secrets import mask_settings

logger = logging.getLogger("tinyllava")
DEFAULTS = {field.name: field.default for field in fields(TrainingArguments) if field.default is not MISSING}
OF_THE_RUN = ("recipe", "fingerprint", "versions", "git", "devices", "changes")
NOT_OF_A_STAGE = (*OF_THE_RUN, "recipe_yaml", "stage", "step")  # in the record of a checkpoint


class RunRecord:
    """The content of `run.json`: hash of the recipe, versions, git state, and the data and the progress of each stage.

    `changes` lists how the execution changed at each start. Raises UserError when the directory holds the run of
    another recipe.
    """

    def __init__(self, directory: Path, recipe: Recipe, name: str) -> None:
        self.directory, self.recipe_yaml = directory, recipe.to_yaml()
        self.content: dict[str, Any] = {
            "recipe": name,
            "fingerprint": recipe.compute_hash(),
            "versions": get_versions(),
            "git": get_git_state(),
            "devices": int(os.environ.get("WORLD_SIZE", 1)),
            "stages": {stage: {"finished": False} for stage in recipe.stages},
        }
        begun = read_begun_stages(directory)
        runs = [
            {**run, "settings": parse_recipe(run["recipe_yaml"], f"of the run {directory}").model_dump(mode="json")}
            for run in begun or read_start(directory)
        ]
        now = {**self.content, "settings": recipe.model_dump(mode="json")}
        self.changes = check_same_run(directory, runs, now, DEFAULTS)  # since the last start
        self.content["changes"] = max((run.get("changes", []) for run in begun), key=len, default=[])
        for run in begun:
            self.content["stages"][run["stage"]] = {key: run[key] for key in run if key not in NOT_OF_A_STAGE}

    def add_changes(self, stage: str, resumed: Mapping[str, Any]) -> None:
        """Record and log what changed since the last start. resumed: the record of the checkpoint to resume from."""
        if self.changes:
            logger.info("stage %s: changed since the last start: %s", stage, ", ".join(map(str, self.changes)))
        earlier, step = resumed.get("changes", self.content["changes"]), resumed.get("step", 0)
        place = {"stage": stage, "step": step}
        self.content["changes"] = [*earlier, *(place | change.to_dict() for change in self.changes)]
        self.changes = []

    def update_stage(self, name: str, **facts: Any) -> None:
        """Add facts about a stage, and write the file."""
        self.content["stages"][name] |= facts
        self.write()

    def write(self) -> None:
        """Write the file, and the recipe beside it, in the main process."""
        if is_main_process():
            atomic.write_text(self.directory / RECIPE, self.recipe_yaml)
            atomic.write_text(self.directory / RUN, json.dumps(mask_settings(self.content), indent=2) + "\n")

    def describe_stage(self, name: str, step: int) -> dict[str, Any]:
        """The part of the record that a checkpoint of this stage contains."""
        facts = {key: self.content[key] for key in OF_THE_RUN}
        facts |= {"recipe_yaml": self.recipe_yaml, **self.content["stages"][name], "stage": name, "step": step}
        return mask_settings(facts)
