"""What a run tells its user while it trains: a log without gaps or repeats, and a quiet progress bar."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from tinyllava.train.callbacks import ProgressBar, RunLog, read_metrics


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to="none")


def make_state(step: int, main: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=1000, epoch=step / 100, is_world_process_zero=main)


def train_with(log: RunLog, args: TrainingArguments, start: int, steps: int, loss=lambda step: 1 / step) -> None:
    """Steps `start` + 1 ... `steps` as the Trainer reports them: a log every second step, a save every fourth."""
    log.on_train_begin(args, make_state(start), TrainerControl())
    for step in range(start + 1, steps + 1):
        if step % 2 == 0:
            log.on_log(
                args, make_state(step), TrainerControl(), logs={"loss": loss(step), "lr/llm": 1e-3, "grad_norm": 1.0}
            )
        if step % 4 == 0:
            log.on_log(args, make_state(step), TrainerControl(), logs={"eval_loss": 2 / step})
            log.on_save(args, make_state(step), TrainerControl())


# -- metrics.jsonl and curve.png ---------------------------------------------------------------------------------------


def test_a_resumed_run_reads_as_an_undisturbed_one(tmp_path: Path, args: TrainingArguments) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_with(RunLog(whole), args, 0, 16)
    train_with(RunLog(killed), args, 0, 10)
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')  # torn by the kill
    train_with(RunLog(killed), args, 8, 16)  # resumes from its last save

    ours, expected = read_metrics(killed / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl")
    assert [{**line, "time": 0} for line in ours] == [{**line, "time": 0} for line in expected]
    times = [line["time"] for line in ours]
    assert times == sorted(times)
    assert len((killed / "metrics.jsonl").read_text().splitlines()) == len(expected)


def test_a_fresh_start_keeps_nothing_of_an_earlier_run(tmp_path: Path, args: TrainingArguments) -> None:
    for losses in (5.0, 7.0):
        train_with(RunLog(tmp_path), args, 0, 4, lambda step, loss=losses: loss)
    assert {line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line} == {7.0}


def test_a_save_closes_a_line_of_the_log(tmp_path: Path, args: TrainingArguments) -> None:
    control = TrainerControl(should_save=True, should_log=False)
    RunLog(tmp_path).on_step_end(args, make_state(3), control)
    assert control.should_log


def test_what_is_no_number_is_null(tmp_path: Path, args: TrainingArguments) -> None:
    train_with(RunLog(tmp_path), args, 0, 2, lambda step: float("nan"))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["loss"] is None


def test_only_the_main_process_writes(tmp_path: Path, args: TrainingArguments) -> None:
    log = RunLog(tmp_path / "stage")
    log.on_train_begin(args, make_state(0, main=False), TrainerControl())
    log.on_log(args, make_state(1, main=False), TrainerControl(), logs={"loss": 1.0})
    log.on_save(args, make_state(1, main=False), TrainerControl())
    assert not (tmp_path / "stage").exists()


def test_the_curve_is_a_picture_at_every_save(tmp_path: Path, args: TrainingArguments) -> None:
    train_with(RunLog(tmp_path), args, 0, 3)
    assert not (tmp_path / "curve.png").exists()
    train_with(RunLog(tmp_path), args, 0, 8)
    with Image.open(tmp_path / "curve.png") as image:
        assert min(image.size) > 500
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # axes, lines and letters
    assert not list(tmp_path.glob("*.partial"))


# -- the progress bar --------------------------------------------------------------------------------------------------


def show_progress(
    args: TrainingArguments, console: Console, steps: int = 300, main: bool = True, every: float = 15.0
) -> None:
    bar = ProgressBar("finetune", every=every, console=console)
    bar.on_train_begin(args, make_state(0, main), TrainerControl())
    for step in range(1, steps + 1):
        bar.on_step_end(args, make_state(step, main), TrainerControl())
        if step % 10 == 0:
            logs = {"loss": 1.2345, "lr/llm": 1e-3, "lr/connector": 1e-3, "data_wait": 0.021}
            bar.on_log(args, make_state(step, main), TrainerControl(), logs=logs)
    bar.on_train_end(args, make_state(steps, main), TrainerControl())


def test_a_pipe_gets_a_few_whole_lines(args: TrainingArguments) -> None:
    file = io.StringIO()
    show_progress(args, Console(file=file, width=40))
    lines = file.getvalue().splitlines()
    assert len(lines) == 2  # the first numbers, and the end
    for fact in ("finetune", "step 300/1000", "loss 1.234", "lr 1.0e-03 ", "samples/s", "data wait 2.1 %", "left"):
        assert fact in lines[-1]


def test_a_terminal_gets_a_bar_and_its_cursor_back(args: TrainingArguments) -> None:
    file = io.StringIO()
    show_progress(args, Console(file=file, force_terminal=True, width=120, legacy_windows=False))
    written = file.getvalue()
    assert "300/1000" in written and "loss 1.234" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_other_processes_are_silent(args: TrainingArguments) -> None:
    file = io.StringIO()
    show_progress(args, Console(file=file), main=False)
    assert file.getvalue() == ""
