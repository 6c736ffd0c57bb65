"""A process that dies ends the others, and its message is the first. A signal to one process stops all of them.

Run it with `make test-distributed`.
"""

import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.distributed.break_rank import MESSAGE
from tests.distributed.conftest import IS_RUN, MORE, make_recipe
from tests.distributed.launch import TORCHRUN
from tests.distributed.test_engines_equal_one_process import assert_same_steps
from tests.train.test_stage import ROOT
from tinyllava.failures import LOST_MESSAGE
from tinyllava.resume import find_resume_fault
from tinyllava.runs import list_checkpoints
from tinyllava.train import stage

pytestmark = pytest.mark.skipif(not IS_RUN, reason="it has an environment of its own: run `make test-distributed`")
LIMIT = 60  # seconds after which all have ended, as docs/training.md states. torchrun kills after 30


def launch(how: str, mixed: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Run the command in two processes, one of which fails."""
    recipe = make_recipe(MORE[0], mixed).model_dump(exclude_none=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [how, "train", str(folder / "recipe.yaml"), "--output", str(folder / "run"), *overrides]
    command = [*TORCHRUN, "--nproc_per_node=2", "-m", "tests.distributed.break_rank", *arguments]
    return subprocess.run(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ
    )


def train(how: str, mixed: Path, folder: Path, *overrides: str) -> tuple[list[str], float]:
    """Launch it; returns the lines on stderr, and how long it ran on after the failure."""
    done = launch(how, mixed, folder, *overrides)
    assert done.returncode not in (0, None), done.stderr
    lines = done.stderr.splitlines()
    failed = [float(line.split()[-1]) for line in lines if line.startswith("fails at")]
    return lines, time.time() - failed[0] if failed else 0.0


def list_errors(lines: list[str]) -> list[str]:
    """What our processes say, before what torchrun says of them."""
    end = next(number for number, line in enumerate(lines) if "torch/distributed/elastic" in line)
    return [line for line in lines[:end] if line.startswith("error: ") or "Traceback" in line]


def find_cause(lines: list[str]) -> str:
    """What torchrun's summary names as the cause."""
    text = "\n".join(lines)
    return text[text.index("Root Cause") :]


def test_a_killed_process_ends_the_others(mixed: Path, tmp_path: Path) -> None:
    lines, seconds = train("kill", mixed, tmp_path)
    assert seconds < LIMIT
    assert list_errors(lines) in ([f"error: {LOST_MESSAGE}"], [])  # [] if torchrun was faster
    assert "rank      : 1 " in find_cause(lines) and "Signal 9 (SIGKILL)" in find_cause(lines)


def test_the_error_of_one_process_is_the_first_and_the_cause(mixed: Path, tmp_path: Path) -> None:
    lines, seconds = train("refuse", mixed, tmp_path)
    assert seconds < LIMIT
    assert list_errors(lines)[0] == f"error: {MESSAGE}"
    assert set(list_errors(lines)[1:]) <= {f"error: {LOST_MESSAGE}"}
    assert f"traceback : {MESSAGE}" in find_cause(lines)


def test_a_fault_in_one_process_shows_its_own_traceback(mixed: Path, tmp_path: Path) -> None:
    lines, seconds = train("crash", mixed, tmp_path)
    assert seconds < LIMIT
    assert [line for line in lines if "ZeroDivisionError: " in line] == [f"[rank1]: ZeroDivisionError: {MESSAGE}"]
    assert [line for line in list_errors(lines) if "Traceback" in line] == [
        "[rank1]: Traceback (most recent call last):"
    ]
    assert "rank      : 1 " in find_cause(lines)


def test_what_all_processes_refuse_is_said_once(mixed: Path, tmp_path: Path) -> None:
    lines, _ = train("kill", mixed, tmp_path, "stages.finetune.trainer.learning_rat=1")
    (error,) = list_errors(lines)
    assert "unknown key 'stages.finetune.trainer.learning_rat'" in error and "learning_rat'" in find_cause(lines)


def test_a_signal_to_one_process_stops_all_after_the_same_step(mixed: Path, tmp_path: Path) -> None:
    """Each of two processes writes its half of the optimiser: the checkpoint is whole only if both stop there."""
    options = {"num_train_epochs": 2, "save_strategy": "no"}
    overrides = [f"stages.finetune.trainer.{name}={value}" for name, value in {**options, "deepspeed": "zero3"}.items()]
    lines, seconds = train("stop", mixed, tmp_path, *overrides)
    assert seconds < LIMIT
    # The signal arrives in the third step. Its end sends it to the others, and the end of the next step reads it.
    (saved,) = list_checkpoints(tmp_path / "run" / "finetune")
    assert saved.name == "checkpoint-4" and not find_resume_fault(saved, "deepspeed", 2)
    (line,) = [line for line in lines if line.startswith("stopped by SIGTERM")]
    assert f"saved {saved} of 8 steps. To resume: tinyllava train " in line
    resumed = launch("stop", mixed, tmp_path, *overrides)  # without the third step, it gets no signal
    assert resumed.returncode == 0, resumed.stderr
    stage.run(make_recipe(MORE[0], mixed, **options), "tiny", tmp_path / "one")
    assert_same_steps(tmp_path / "run", tmp_path / "one")
