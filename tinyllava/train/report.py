"""What a run tells its user: the progress bar, `metrics.jsonl` and `curve.png`, the table of parts, coloured tokens.

runs/quickstart/finetune/metrics.jsonl     {"step": 10, "epoch": 0.1, "time": 12.3, "loss": 4.2, "lr/llm": 0.001, ...}
"""

import atexit
import json
import math
import time
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tinyllava.console import messages
from tinyllava.data.sample import IMAGE_TOKEN
from tinyllava.data.spans import IGNORE
from tinyllava.train import curve
from tinyllava.train.tune import Tuned

SPEED_WINDOW = 50  # steps over which speed and time left are measured
METRICS, CURVE = "metrics.jsonl", "curve.png"


class RunLog(TrainerCallback):
    """`metrics.jsonl`, a line a log, and `curve.png` in a stage's directory, drawn at every save and at the end.

    After a resume the lines beyond the resumed step are dropped and `time` (seconds of training) goes on, so that the
    file reads as one undisturbed run.
    """

    def __init__(self, directory: Path):
        self.directory, self.path = directory, directory / METRICS
        self.lines: list[dict[str, Any]] = []
        self.offset = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Take over what an interrupted run logged up to the step from which this one goes on."""
        if not state.is_world_process_zero:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        before = read_metrics(self.path) if state.global_step else []
        self.lines = [line for line in before if line["step"] <= state.global_step and "train_runtime" not in line]
        beside = self.path.with_suffix(".partial")
        beside.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        beside.replace(self.path)
        self.offset = (self.lines[-1]["time"] if self.lines else 0.0) - time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Log at every save: a logged loss is a mean since the last log, which a resumed run must take likewise."""
        if control.should_save:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs: Any):
        """Append one line."""
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        line |= {"time": round(time.perf_counter() + self.offset, 2)}
        line |= {key: _json_number(value) for key, value in (logs or {}).items() if key not in line}
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Draw what there is."""
        if state.is_world_process_zero:
            title = f"{self.directory.resolve().parent.name}: {self.directory.name}"
            curve.draw(self.lines, title, self.directory / CURVE)

    on_train_end = on_save


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, [] if there is none; a last line that a kill tore is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ProgressBar(TrainerCallback):
    """A stage's progress on stderr, of the main process: a bar on a terminal, else a line every `every` seconds."""

    def __init__(self, name: str, every: float = 15.0, console: Console = messages):
        self.name, self.every, self.console = name, every, console
        self.bar: Progress | None = None
        self.logs: dict[str, float] = {}
        self.marks: deque[tuple[float, int]] = deque(maxlen=SPEED_WINDOW + 1)  # (when, step)
        self.printed = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Start at the step from which the run goes on."""
        if not state.is_world_process_zero:
            return
        self.batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.marks.append((time.perf_counter(), state.global_step))
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[facts]}"), console=self.console, expand=True)
            self.task = self.bar.add_task(self.name, total=state.max_steps, completed=state.global_step, facts="")
            self.bar.start()
            atexit.register(self.close)  # an error must not leave the terminal without its cursor

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Advance by one step."""
        if not state.is_world_process_zero:
            return
        self.marks.append((time.perf_counter(), state.global_step))
        if self.bar:
            self.bar.update(self.task, completed=state.global_step, facts=self.facts(state))
        elif self.logs and time.perf_counter() - self.printed >= self.every:
            self.line(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs: Any):
        """Remember the latest numbers; the first ones are shown at once."""
        self.logs |= logs or {}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Leave the finished bar, or a last line, behind."""
        if not state.is_world_process_zero:
            return
        if self.bar:
            self.bar.update(self.task, completed=state.global_step, facts=self.facts(state))
        else:
            self.line(state)
        self.close()

    def close(self) -> None:
        """Stop drawing and give the terminal back. May be called at any time, and twice."""
        if self.bar:
            self.bar.stop()
            self.bar = None
            atexit.unregister(self.close)

    def line(self, state: TrainerState) -> None:
        """One line of progress, for files and pipes."""
        self.printed = time.perf_counter()
        text = f"{self.name}  step {state.global_step}/{state.max_steps}  {self.facts(state)}"
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def facts(self, state: TrainerState) -> str:
        """`loss 1.234  lr 1.0e-03  212 samples/s  data wait 0.4 %  0:03:12 left`"""
        logs, facts = self.logs, []
        if "loss" in logs:
            facts.append(f"loss {logs['loss']:.3f}")
        if "eval_loss" in logs:
            facts.append(f"validation {logs['eval_loss']:.3f}")
        rates = sorted({rate for key, rate in logs.items() if key.startswith("lr/")}, reverse=True)
        if rates:
            facts.append("lr " + "|".join(f"{rate:.1e}" for rate in rates))
        (begin, first), (end, last) = self.marks[0], self.marks[-1]
        if last > first:
            seconds = (end - begin) / (last - first)  # a step
            facts.append(f"{self.batch / seconds:.3g} samples/s")
            if "data_wait" in logs:
                facts.append(f"data wait {100 * logs['data_wait']:.1f} %")
            facts.append(f"{_clock(seconds * (state.max_steps - last))} left")
        return "  ".join(facts)


def _clock(seconds: float) -> str:
    """H:MM:SS"""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def parts_table(rows: list[Tuned], lr: float) -> Table:
    """What is trained of each part, and at what learning rate (`lr` is the stage's, for parts that name none)."""
    table = Table(box=SIMPLE_HEAD, show_footer=True, pad_edge=False, collapse_padding=True)
    total, trainable = sum(row.parameters for row in rows), sum(row.trainable for row in rows)
    table.add_column("part", "total")
    table.add_column("class", no_wrap=True)
    table.add_column("parameters", _count(total), justify="right", no_wrap=True)
    table.add_column(
        "trainable", f"{_count(trainable)}\n{100 * trainable / max(total, 1):.1f} %", justify="right", no_wrap=True
    )
    table.add_column("tuning")
    table.add_column("learning rate", justify="right")
    table.add_column("dtype", no_wrap=True)
    for row in rows:
        rate = f"{row.lr or lr:g}" if row.trainable else "-"
        dtype = row.dtype.replace("bfloat", "bf").replace("float", "fp")  # as TrainingArguments call them
        cells = (_count(row.parameters), _count(row.trainable), row.tuning, rate, dtype)
        table.add_row(row.part.replace("_", " "), row.class_name, *cells, style="" if row.trainable else "dim")
    return table


def _count(number: int) -> str:
    """A number of parameters: exact below ten million, else as 412.4 M or 2.78 B."""
    if number < 10_000_000:
        return f"{number:,}"
    return f"{number / 1e6:.1f} M" if number < 1_000_000_000 else f"{number / 1e9:.2f} B"


def colour_tokens(
    input_ids: Sequence[int],
    labels: Sequence[int],
    tokenizer: Any,
    image_token_id: int,
    image_tokens: Sequence[int] = (),
) -> Text:
    """A sample's text: supervised tokens green, the rest dim, line breaks visible, a picture as `<image x 729>`.

    `image_tokens`, positions of each picture in order, tells those apart that stand side by side.
    """
    text, at, counts = Text(), 0, list(image_tokens)
    ids, supervised = [int(i) for i in input_ids], [int(label) != IGNORE for label in labels]
    for (is_image, learnt), run in groupby(
        zip(ids, supervised, strict=True), lambda pair: (pair[0] == image_token_id, pair[1])
    ):
        length = len(list(run))
        if is_image:
            while length > 0:
                count = counts.pop(0) if counts else length
                text.append(f"{IMAGE_TOKEN[:-1]} x {count}>", style="cyan")
                at, length = at + count, length - count
        else:
            piece = _decode_after(ids[max(at - 1, 0) : at], ids[at : at + length], tokenizer)
            text.append(piece.replace("\n", "↵\n"), style="bold green" if learnt else "dim")
        at += length
    return text


def _decode_after(before: list[int], ids: list[int], tokenizer: Any) -> str:
    """`ids` as text. Decoding them alone would lose a SentencePiece tokenizer's leading space."""
    head = tokenizer.decode(before, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode(before + ids, clean_up_tokenization_spaces=False)
    return whole.removeprefix(head) if whole.startswith(head) else tokenizer.decode(ids)


def length_histogram(lengths: Sequence[int] | np.ndarray, width: int = 40, rows: int = 10) -> str:
    """How many samples have how many positions, as lines of text; the longest bar is `width` characters."""
    lengths = np.asarray(lengths)
    low, high = int(lengths.min()), int(lengths.max())
    step = max(1, -(-(high - low + 1) // rows))
    counts = np.bincount((lengths - low) // step)
    digits = len(str(low + step * len(counts)))
    lines = []
    for number, count in enumerate(counts):
        begin = low + number * step
        bar = "█" * round(width * count / counts.max()) or ("▏" if count else "")
        span = f"{begin:>{digits}} - {begin + step - 1:>{digits}}" if step > 1 else f"{begin:>{digits}}"
        lines.append(f"{span}  {bar} {count:,}")
    return "\n".join(lines)
