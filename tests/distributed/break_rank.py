"""`tinyllava` with a process of the group that fails, or gets a signal, in the middle of the third step:

torchrun --nproc_per_node 2 -m tests.distributed.break_rank HOW train RECIPE ...
"""

import os
import signal
import sys
import time
from typing import Any

import torch

from tinyllava import cli
from tinyllava.errors import UserError
from tinyllava.train.trainer import Trainer

MESSAGE = "the image of sample i7 cannot be read"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGTERM}


def fail(how: str) -> None:
    """Fail as `how` says. After "stop", the step goes on."""
    print(f"fails at {time.time()}", file=sys.stderr, flush=True)
    if how in SIGNALS:
        os.kill(os.getpid(), SIGNALS[how])
        return
    raise UserError(MESSAGE) if how == "refuse" else ZeroDivisionError(MESSAGE)


def main() -> None:
    """Let rank 1 fail, and run the command."""
    how, *arguments = sys.argv[1:]
    original = Trainer.training_step

    def training_step(self: Trainer, *args: Any) -> torch.Tensor:
        if os.environ["RANK"] == "1" and self.state.global_step == 2:
            fail(how)
        return original(self, *args)

    Trainer.training_step = training_step
    cli.main(arguments)


if __name__ == "__main__":
    main()
