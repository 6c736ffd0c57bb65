"""Let experiment trackers continue a run that was interrupted, instead of beginning another one."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from tinyllava.runs import TENSORBOARD

if TYPE_CHECKING:
    from transformers import Trainer


def make_run_id(stage: str) -> str:
    """An id by which trackers know the run of a stage. Its checkpoints keep it."""
    return f"{stage}-{uuid4().hex[:8]}"


@contextmanager
def track_as(run_id: str, trainer: "Trainer", step: int) -> Iterator[None]:
    """Let the trackers continue the run `run_id` in this block, behind `step`, or begin it.

    W&B knows a run by its id, Trackio by its name, TensorBoard by its folder. A W&B run that the user has begun, or an
    id in WANDB_RUN_ID, is used as it is.
    """
    trainer.args.run_name = trainer.args.run_name or run_id
    _continue_tensorboard(trainer, step)
    is_begun = getattr(sys.modules.get("wandb"), "run", None) is not None
    ours = {} if is_begun or "WANDB_RUN_ID" in os.environ else {"WANDB_RUN_ID": run_id, "WANDB_RESUME": "allow"}
    os.environ.update(ours)
    try:
        yield
    finally:
        for key in ours:
            os.environ.pop(key, None)
        wandb = sys.modules.get("wandb")
        if ours and getattr(wandb, "run", None) is not None:  # the next stage is another run
            wandb.finish(exit_code=int(sys.exc_info()[0] is not None))


def _continue_tensorboard(trainer: "Trainer", step: int) -> None:
    """Log to one folder at all starts. What an interrupted run logged beyond `step` is logged again, and replaced."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and trainer.is_world_process_zero():
            folder = callback.logging_dir or Path(trainer.args.output_dir) / TENSORBOARD
            callback.tb_writer = SummaryWriter(folder, purge_step=step + 1)
