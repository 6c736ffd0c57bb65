"""A signal at any moment of a run: what is saved resumes to the losses of a run that was never stopped."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.train.tiny_run import recipe
from tinyllava.errors import Interrupted, UserError
from tinyllava.runs import list_checkpoints
from tinyllava.train import stage
from tinyllava.train.callbacks import read_metrics

SMALL: dict[str, Any] = {"num_train_epochs": 2, "save_steps": 100, "eval_steps": 2}  # six steps, three an epoch


class Sender(TrainerCallback):
    """Sends this process a signal at an event of a step."""

    def __init__(self, event: str, step: int, *numbers: int) -> None:
        self.event, self.step, self.numbers = event, step, numbers
        setattr(self, event, self.send)

    def send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def train(pictures: Path, run: Path, *senders: Sender, stages: tuple = ("finetune",), **trainer: Any) -> Path:
    settings = recipe(pictures, stages=stages, **{**SMALL, **trainer})
    return stage.run(settings, "tiny", run, follow=lambda *_: senders)


def read_log(run: Path) -> list[tuple]:
    lines = read_metrics(run / "finetune" / "metrics.jsonl")
    return [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines if "train_runtime" not in line]


CASES: dict[str, tuple[dict[str, Any], Sender, int]] = {  # trainer, signal, step of the checkpoint that it leaves
    "in a validation": ({}, Sender("on_evaluate", 2, signal.SIGUSR1), 2),
    "while saving": ({"save_steps": 3}, Sender("on_save", 3, signal.SIGHUP), 3),
    "nothing is saved otherwise": ({"save_strategy": "no"}, Sender("on_step_end", 1, signal.SIGINT), 1),
    "the last step of an epoch": (
        {"eval_strategy": "epoch", "save_strategy": "epoch"},
        Sender("on_step_end", 3, signal.SIGTERM),
        3,
    ),
}


@pytest.fixture(scope="module")
def undisturbed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[tuple]]:
    """The log of a run that is not stopped, by when it validates."""
    logs: dict[tuple, list[tuple]] = {}

    def read(**validation: Any) -> list[tuple]:
        key = tuple(validation.items())
        if key not in logs:
            run = tmp_path_factory.mktemp("undisturbed")
            train(pictures, run, **validation)
            logs[key] = read_log(run)
        return logs[key]

    return read


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_resumes_to_the_same_losses(
    case: str, pictures: Path, tmp_path: Path, undisturbed: Callable[..., list[tuple]]
) -> None:
    trainer, sender, step = CASES[case]
    with pytest.raises(Interrupted) as error:
        train(pictures, tmp_path, sender, **trainer)
    newest = tmp_path / "finetune" / f"checkpoint-{step}"
    assert list_checkpoints(tmp_path / "finetune")[0] == newest and f"saved {newest} of 6 steps." in str(error.value)
    assert error.value.code == (130 if signal.SIGINT in sender.numbers else 75)
    train(pictures, tmp_path, **trainer)
    validation = {key: value for key, value in trainer.items() if key == "eval_strategy"}
    assert read_log(tmp_path) == undisturbed(**validation)


def test_after_the_last_step_the_stage_is_finished_first(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="the stage that was running is finished") as error:
        train(pictures, tmp_path, Sender("on_step_end", 6, signal.SIGTERM))
    assert error.value.code == 75 and (tmp_path / "finetune" / "final" / "tinyllava.json").is_file()
    train(pictures, tmp_path)  # nothing is left to do


def test_a_second_ctrl_c_and_a_run_without_optimiser_cannot_resume(pictures: Path, tmp_path: Path) -> None:
    twice = Sender("on_step_begin", 1, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(pictures, tmp_path / "twice", twice)
    assert list_checkpoints(tmp_path / "twice" / "finetune") == []
    with pytest.raises(Interrupted, match=r"without the optimiser.*save_only_model: true.*cannot be resumed") as error:
        train(pictures, tmp_path / "only", Sender("on_step_end", 1, signal.SIGTERM), save_only_model=True)
    assert error.value.code == 128 + signal.SIGTERM
    with pytest.raises(UserError, match="save_only_model"):
        train(pictures, tmp_path / "only", save_only_model=True)
