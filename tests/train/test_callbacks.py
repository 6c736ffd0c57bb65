"""The log of a run has no gaps or repeats."""

import json
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from tinyllava.train.callbacks import RunLog, read_metrics


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
