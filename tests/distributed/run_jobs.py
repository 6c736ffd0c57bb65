"""Train many recipes in one group of processes, because starting a process takes longer than a tiny training run.

torchrun --standalone --nproc_per_node 2 -m tests.distributed.run_jobs JOBS

JOBS is a file with [{"name", "recipe", "output"}]. Each process writes NAME.RANK.json beside it. Under FSDP, accelerate
falls back to DDP on a CPU: its state is set here, and the rest is as on GPUs.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from tinyllava.config import Recipe
from tinyllava.errors import UserError
from tinyllava.train import stage
from tinyllava.train.trainer import Trainer

RANK = int(os.environ.get("RANK", 0))
seen: dict[str, Any] = {}  # what the trainers of the current job did


def set_fsdp_on_cpu() -> None:
    """Let a state that is made with an FSDP plugin be one of FSDP."""
    original = AcceleratorState.__init__

    def initialize(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # later states read it here

    AcceleratorState.__init__ = initialize


def record_trainers() -> None:
    """Note the engine, the number of processes, and which micro-batches of this process have images."""
    original = Trainer.training_step

    def training_step(self: Trainer, model: torch.nn.Module, inputs: dict, *args: Any) -> torch.Tensor:
        seen["engines"][Path(self.args.output_dir).name] = type(model).__name__
        seen["world"] = self.accelerator.num_processes
        seen["images"].append("pixel_values" in inputs)
        return original(self, model, inputs, *args)

    Trainer.training_step = training_step


def run_job(job: dict[str, Any]) -> str | None:
    """Train; returns the message of a refusal."""
    try:
        stage.run(Recipe.model_validate(job["recipe"]), "tiny", Path(job["output"]))
    except UserError as error:
        return str(error)
    return None


def run_jobs(path: Path) -> None:
    """Run all jobs of a file."""
    set_fsdp_on_cpu()
    record_trainers()
    for job in json.loads(path.read_text()):
        seen.update(engines={}, images=[], world=None)
        start = time.perf_counter()
        error = run_job(job)
        seconds = round(time.perf_counter() - start, 2)
        path.with_name(f"{job['name']}.{RANK}.json").write_text(json.dumps({**seen, "error": error}))
        gc.collect()  # a trainer's cycles hold DeepSpeed's configuration, which the next job would find
        print(f"{job['name']} [{RANK}] {seconds} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_jobs(Path(sys.argv[1]))
