"""What accompanies a stage while it trains: its log, and the signals that stop it.

A line of runs/quickstart/finetune/metrics.jsonl:

    {"step": 10, "epoch": 0.1, "time": 12.3, "loss": 4.2, "lr/llm": 0.001, ...}
"""

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from tinyllava import atomic
from tinyllava.interrupt import StopRequest
from tinyllava.runs import METRICS


class RunLog(TrainerCallback):
    """Writes `metrics.jsonl`, one line per log.

    After a resume, lines beyond the resumed step are dropped and `time` (seconds of training) continues from the last
    line kept. The file then reads as one undisturbed run.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / METRICS
        self.lines: list[dict[str, Any]] = []
        self.offset = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Keep what an interrupted run logged up to the step that this one resumes from."""
        if not state.is_world_process_zero:
            return
        before = read_metrics(self.path) if state.global_step else []
        self.lines = [line for line in before if line["step"] <= state.global_step and "train_runtime" not in line]
        atomic.write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        args.eval_on_start = args.eval_on_start and not state.global_step  # a resumed run has done it
        self.offset = (self.lines[-1]["time"] if self.lines else 0.0) - time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Log at every save: a resumed run starts at a save, and a logged loss is the mean since the last log.

        A validation may save the best weights.
        """
        if control.should_save or control.should_evaluate:
            control.should_log = True

    on_epoch_end = on_step_end

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Append one line."""
        self.add_line(state, kwargs["logs"])

    def add_line(self, state: TrainerState, values: dict[str, Any]) -> None:
        """Append a line with these values, and the step and the time."""
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        line |= {"time": round(time.perf_counter() + self.offset, 2)}
        line |= {key: _to_json_number(value) for key, value in values.items() if key == "step" or key not in line}
        self.lines.append(line)
        atomic.append_text(self.path, json.dumps(line) + "\n")


class Stopper(TrainerCallback):
    """Saves and stops at the end of the step in which a signal arrived at any rank. It must be the last callback.

    A validation of this step comes first, because a resumed run begins with the next step. The last step of a stage is
    not stopped.
    """

    def __init__(self, stop: StopRequest, callbacks: CallbackHandler) -> None:
        self.stop, self.callbacks, self.waits = stop, callbacks, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Ask for a checkpoint. After the last step of an epoch, its validation may follow."""
        self.waits = args.eval_strategy == "epoch" and state.epoch == int(state.epoch)
        if self.is_due(args, state):
            control.should_log = control.should_save = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Ask for a checkpoint after the validation of an epoch, or if the signal arrived during a validation."""
        self.waits = False
        control.should_save |= self.is_due(args, state)

    on_evaluate = on_epoch_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Raise Interrupted."""
        if self.is_due(args, state):
            self.callbacks.on_train_end(args, state, control)  # close the progress bar and the trackers
            saved = f"saved {args.output_dir}/checkpoint-{state.global_step} of {state.max_steps} steps"
            lacks = ", but without the optimiser, because of `save_only_model: true`. It cannot be resumed from"
            raise self.stop.make_error(saved + lacks * args.save_only_model, not args.save_only_model)

    def is_due(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether to stop after this step. All ranks call it together, and get the same answer."""
        return self.stop.agree(args.device) and not self.waits and state.global_step < state.max_steps


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; [] if there is none. Lines that are incomplete or damaged are left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and {"step", "time"} <= line.keys()]


def _to_json_number(value: Any) -> Any:
    """`value`, or None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
