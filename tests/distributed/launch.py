"""Start processes that form one group, and read what each job left."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests.distributed.cases import SAVED
from tests.train.test_stage import ROOT
from tinyllava.config import Recipe

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


class Job(NamedTuple):
    """A training run, in the directory `output`, or its resuming."""

    name: str
    recipe: Recipe
    output: Path


class Ran(NamedTuple):
    """What a job left."""

    output: Path
    ranks: list[dict[str, Any]]  # for each process: "engines", "world", "images", "error" (run_jobs.py)

    @property
    def error(self) -> str | None:
        """The message of the refusal; the same in all processes."""
        (error,) = {rank["error"] for rank in self.ranks}
        return error


def run_jobs(jobs: list[Job], world: int, folder: Path) -> dict[str, Ran]:
    """Run all jobs in one group of `world` processes; returns {name: what it left}."""
    folder.mkdir()
    listed = [{**job._asdict(), "recipe": job.recipe.model_dump(), "output": str(job.output)} for job in jobs]
    (folder / "jobs.json").write_text(json.dumps(listed))
    launcher = [sys.executable] if world == 1 else [*TORCHRUN, f"--nproc_per_node={world}"]
    command = [*launcher, "-m", "tests.distributed.run_jobs", str(folder / "jobs.json")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "TINYLLAVA_CACHE": str(folder / "cache")}
    with (folder / "stderr").open("w") as errors:
        done = subprocess.run(command, cwd=ROOT, stdout=errors, stderr=errors, env=environment)
    assert done.returncode == 0, (folder / "stderr").read_text()[-6000:]
    read = {
        job.name: [json.loads((folder / f"{job.name}.{rank}.json").read_text()) for rank in range(world)]
        for job in jobs
    }
    return {job.name: Ran(job.output, read[job.name]) for job in jobs}


def interrupt(finished: Path, output: Path, stage: str = "finetune") -> Path:
    """Copy a finished run as if it had been killed before its second checkpoint."""
    shutil.copytree(finished, output)
    for path in (output / stage).glob("*"):
        if path.name.startswith(("checkpoint-", "final")) and path.name != f"checkpoint-{SAVED}":
            shutil.rmtree(path)
    return output


def read_steps(run: Path, stage: str = "finetune") -> dict[int, tuple[float | None, float]]:
    """{step: (loss, norm of the gradient)}; (None, 0) for a step that was skipped"""
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}
