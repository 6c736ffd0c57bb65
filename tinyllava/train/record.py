"""The record of a run: what made these weights.

`run.json` in the run's directory, and a copy inside every checkpoint.
"""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tinyllava.config import Recipe
from tinyllava.errors import UserError

RUN = "run.json"
PACKAGES = (
    "tinyllava-factory",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "deepspeed",
    "bitsandbytes",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the package's own source and whether it has uncommitted changes; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


class RunRecord:
    """`run.json`: the recipe's fingerprint, versions, git state, and for each stage its data and whether it is
    finished.
    """

    def __init__(self, directory: Path, recipe: Recipe, name: str):
        self.path, self.recipe_yaml = directory / RUN, recipe.to_yaml()
        self.content: dict[str, Any] = {
            "recipe": name,
            "fingerprint": recipe.fingerprint(),
            "versions": versions(),
            "git": git_state(),
            "stages": {stage: {"finished": False} for stage in recipe.stages},
        }
        if self.path.is_file():
            before = json.loads(self.path.read_text(encoding="utf-8"))
            if before["fingerprint"] != self.content["fingerprint"]:
                raise UserError(
                    f"{directory} holds a run of another recipe (or of this one with other settings)."
                    " Choose another --output, or start anew with --overwrite."
                )
            self.content["stages"] = before["stages"]

    def stage(self, name: str, **facts: Any) -> None:
        """Note facts about a stage and write the file."""
        self.content["stages"][name] |= facts
        self.write()

    def write(self) -> None:
        """Write the file whole: beside its place, then renamed."""
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        beside.replace(self.path)

    def of_stage(self, name: str, step: int) -> dict[str, Any]:
        """What a checkpoint of this stage carries."""
        facts = {key: self.content[key] for key in ("recipe", "fingerprint", "versions", "git")}
        return {**facts, "recipe_yaml": self.recipe_yaml, "stage": name, "step": step, **self.content["stages"][name]}


def is_main_process() -> bool:
    """Whether this process writes files and talks to the user (rank 0, or the only one)."""
    return int(os.environ.get("RANK", 0)) == 0
