"""Report a run while it trains: the progress bar, `metrics.jsonl` and `curve.png`.

A line of runs/quickstart/finetune/metrics.jsonl:

    {"step": 10, "epoch": 0.1, "time": 12.3, "loss": 4.2, "lr/llm": 0.001, ...}
"""

import atexit
import json
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tinyllava import atomic
from tinyllava.console import messages
from tinyllava.train import curve

SPEED_WINDOW = 50  # steps over which speed and time left are measured
METRICS, CURVE = "metrics.jsonl", "curve.png"


class RunLog(TrainerCallback):
    """Writes `metrics.jsonl`, one line per log, and draws `curve.png` at every save and at the end.

    After a resume, lines beyond the resumed step are dropped and `time` (seconds of training) continues from the last
    line kept. The file then reads as one undisturbed run.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / METRICS
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
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        line |= {"time": round(time.perf_counter() + self.offset, 2)}
        line |= {key: _to_json_number(value) for key, value in kwargs["logs"].items() if key not in line}
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Draw the curve of everything logged so far."""
        if state.is_world_process_zero:
            title = f"{self.directory.resolve().parent.name}: {self.directory.name}"
            curve.draw_curve(self.lines, title, self.directory / CURVE)

    on_train_end = on_save


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; [] if there is none. A last line that is incomplete after a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _to_json_number(value: Any) -> Any:
    """`value`, or None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ProgressBar(TrainerCallback):
    """Shows a stage's progress on stderr: a bar on a terminal, else a line every `every` seconds."""

    def __init__(self, name: str, every: float = 15.0, console: Console = messages) -> None:
        self.name, self.every, self.console = name, every, console
        self.bar: Progress | None = None
        self.logs: dict[str, float] = {}
        self.marks: deque[tuple[float, int]] = deque(maxlen=SPEED_WINDOW + 1)  # (when, step)
        self.printed = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Start at the step that the run resumes from."""
        if not state.is_world_process_zero:
            return
        self.batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.marks.append((time.perf_counter(), state.global_step))
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[facts]}"), console=self.console, expand=True)
            self.task = self.bar.add_task(self.name, total=state.max_steps, completed=state.global_step, facts="")
            self.bar.start()
            atexit.register(self.close)  # the bar hides the cursor: an error must bring it back

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Advance by one step."""
        if not state.is_world_process_zero:
            return
        self.marks.append((time.perf_counter(), state.global_step))
        if self.bar:
            self.bar.update(self.task, completed=state.global_step, facts=self.describe_progress(state))
        elif self.logs and time.perf_counter() - self.printed >= self.every:
            self.print_line(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Keep the latest numbers for the next bar or line."""
        self.logs |= kwargs["logs"]

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Show the final numbers in the bar or in a last line, and close the bar."""
        if not state.is_world_process_zero:
            return
        if self.bar:
            self.bar.update(self.task, completed=state.global_step, facts=self.describe_progress(state))
        else:
            self.print_line(state)
        self.close()

    def close(self) -> None:
        """Stop drawing and show the cursor again. It can be called at any time, also twice."""
        if self.bar:
            self.bar.stop()
            self.bar = None
            atexit.unregister(self.close)

    def print_line(self, state: TrainerState) -> None:
        """Print one line of progress, for files and pipes."""
        self.printed = time.perf_counter()
        text = f"{self.name}  step {state.global_step}/{state.max_steps}  {self.describe_progress(state)}"
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def describe_progress(self, state: TrainerState) -> str:
        """`loss 1.234  lr 1.0e-03  212 samples/s  data wait 0.4 %  0:03:12 left`"""
        logs, pieces = self.logs, []
        if "loss" in logs:
            pieces.append(f"loss {logs['loss']:.3f}")
        if "eval_loss" in logs:
            pieces.append(f"validation {logs['eval_loss']:.3f}")
        rates = sorted({rate for key, rate in logs.items() if key.startswith("lr/")}, reverse=True)
        if rates:
            pieces.append("lr " + "|".join(f"{rate:.1e}" for rate in rates))
        (begin, first), (end, last) = self.marks[0], self.marks[-1]
        if last > first:
            seconds = (end - begin) / (last - first)  # for one step
            pieces.append(f"{self.batch / seconds:.3g} samples/s")
            if "data_wait" in logs:
                pieces.append(f"data wait {100 * logs['data_wait']:.1f} %")
            pieces.append(f"{_format_seconds(seconds * (state.max_steps - last))} left")
        return "  ".join(pieces)


def _format_seconds(seconds: float) -> str:
    """H:MM:SS"""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
