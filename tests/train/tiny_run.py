"""A two-stage run of a tiny model on real files, in a process of its own:

python -m tests.train.tiny_run PICTURES OUTPUT [--kill-at STEP] [--tune JSON] [--trainer JSON]
"""

import argparse
import json
import os
import signal
from pathlib import Path

from tests.conftest import LLAMA, tiny_model
from tinyllava.config import Recipe

TRAINER = {
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "dataloader_num_workers": 0,
    "per_device_train_batch_size": 4,
}


def recipe(
    pictures: Path, tune: dict | None = None, model: dict | None = None, stages: tuple = (), **trainer
) -> Recipe:
    """Captions, then instructions with validation; `tune`, `model` and `trainer` change the second stage."""
    both = {
        "pretrain": {
            "template": "pretrain",
            "data": [{"path": str(pictures / "captions.json")}],
            "global_batch_size": 8,
            "trainer": {**TRAINER, "save_strategy": "no"},
        },
        "finetune": {
            "data": [{"path": str(pictures / "instructions.json")}],
            "validation": 0.2,
            "tune": tune or {"llm": "full"},
            "global_batch_size": 8,
            "trainer": {**TRAINER, "num_train_epochs": 3, "eval_steps": 3, **trainer},
        },
    }
    chosen = {name: both[name] for name in stages or both}
    return Recipe.model_validate({"model": model or tiny_model(llm=LLAMA), "stages": chosen})


def main() -> None:
    """Run it, killed at a step of the last stage if asked."""
    from transformers import TrainerCallback

    from tinyllava.train import stage
    from tinyllava.train.trainer import Trainer

    parser = argparse.ArgumentParser()
    parser.add_argument("pictures", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--tune", type=json.loads)
    parser.add_argument("--trainer", type=json.loads, default={})
    given = parser.parse_args()

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == given.kill_at and "finetune" in args.output_dir:
                os.kill(os.getpid(), signal.SIGKILL)

    original = Trainer.__init__

    def with_kill(self, *args, callbacks, **kwargs):
        original(self, *args, callbacks=[*callbacks, Kill()], **kwargs)

    Trainer.__init__ = with_kill
    stage.run(recipe(given.pictures, given.tune, **given.trainer), "tiny", given.output)


if __name__ == "__main__":
    main()
