"""Show how a stage trains, for `tinyllava train`: the table of its parts, a progress bar and `curve.png`."""

import atexit
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tinyllava.commands.parts_table import make_parts_table
from tinyllava.console import is_main_process, messages
from tinyllava.pages.curve import draw_curve
from tinyllava.runs import CURVE, METRICS
from tinyllava.train.callbacks import read_metrics
from tinyllava.train.stage import StageSetup

SPEED_WINDOW = 50  # steps over which speed and time left are measured


def follow_stage(name: str, setup: StageSetup, output: Path) -> list[TrainerCallback]:
    """Show the parts of a stage that is ready to train, and return what follows its training (see `train.stage`)."""
    if is_main_process():
        messages.print(make_parts_table(setup.parts, setup.args.learning_rate))
    return [CurveDrawer(output), ProgressBar(name)]


class CurveDrawer(TrainerCallback):
    """Draws `curve.png` beside the log of a stage, at every save and at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Draw the curve of everything logged so far."""
        if state.is_world_process_zero:
            title = f"{self.directory.resolve().parent.name}: {self.directory.name}"
            draw_curve(read_metrics(self.directory / METRICS), title, self.directory / CURVE)

    on_train_end = on_save


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
