"""What `tinyllava train` shows while a stage trains: a curve at every save, and a quiet progress bar."""

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from tinyllava.commands.follow import CurveDrawer, ProgressBar
from tinyllava.train.callbacks import RunLog


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to="none")


def make_state(step: int, main: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=1000, epoch=step / 100, is_world_process_zero=main)


def log_steps(directory: Path, args: TrainingArguments, steps: int) -> None:
    """Log `steps` steps, with a save every fourth step."""
    log, curve = RunLog(directory), CurveDrawer(directory)
    log.on_train_begin(args, make_state(0), TrainerControl())
    for step in range(1, steps + 1):
        logs = {"loss": 1 / step, "lr/llm": 1e-3, "grad_norm": 1.0}
        log.on_log(args, make_state(step), TrainerControl(), logs=logs)
        if step % 4 == 0:
            log.on_log(args, make_state(step), TrainerControl(), logs={"eval_loss": 2 / step})
            curve.on_save(args, make_state(step), TrainerControl())


def test_the_curve_is_a_picture_at_every_save(tmp_path: Path, args: TrainingArguments) -> None:
    log_steps(tmp_path, args, 3)
    assert not (tmp_path / "curve.png").exists()
    log_steps(tmp_path, args, 8)
    with Image.open(tmp_path / "curve.png") as image:
        assert min(image.size) > 500
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # axes, lines and letters
    assert not list(tmp_path.glob("*.partial"))


def test_only_the_main_process_draws(tmp_path: Path, args: TrainingArguments) -> None:
    log_steps(tmp_path, args, 3)
    CurveDrawer(tmp_path).on_save(args, make_state(3, main=False), TrainerControl())
    assert not (tmp_path / "curve.png").exists()


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
