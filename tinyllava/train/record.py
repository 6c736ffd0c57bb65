"""The record of a run, `run.json`: what made its weights. Every checkpoint has a copy in its own record."""

import json
from pathlib import Path
from typing import Any

from tinyllava import atomic
from tinyllava.config import Recipe
from tinyllava.errors import UserError
from tinyllava.provenance import get_git_state, get_versions

RUN = "run.json"


class RunRecord:
    """The content of `run.json`: hash of the recipe, versions, git state, and the data and the progress of each stage.

    Raises UserError when the directory holds the record of another recipe.
    """

    def __init__(self, directory: Path, recipe: Recipe, name: str) -> None:
        self.path, self.recipe_yaml = directory / RUN, recipe.to_yaml()
        self.content: dict[str, Any] = {
            "recipe": name,
            "fingerprint": recipe.compute_hash(),
            "versions": get_versions(),
            "git": get_git_state(),
            "stages": {stage: {"finished": False} for stage in recipe.stages},
        }
        if self.path.is_file():
            before = json.loads(self.path.read_text(encoding="utf-8"))
            if before["fingerprint"] != self.content["fingerprint"]:
                raise UserError(
                    f"{directory} contains a run of another recipe, or of this recipe with other settings."
                    " Choose another --output, or start again with --overwrite."
                )
            self.content["stages"] = before["stages"]

    def update_stage(self, name: str, **facts: Any) -> None:
        """Add facts about a stage, and write the file."""
        self.content["stages"][name] |= facts
        self.write()

    def write(self) -> None:
        """Write the file."""
        atomic.write_text(self.path, json.dumps(self.content, indent=2) + "\n")

    def describe_stage(self, name: str, step: int) -> dict[str, Any]:
        """The part of the record that a checkpoint of this stage contains."""
        facts = {key: self.content[key] for key in ("recipe", "fingerprint", "versions", "git")}
        return {**facts, "recipe_yaml": self.recipe_yaml, "stage": name, "step": step, **self.content["stages"][name]}
