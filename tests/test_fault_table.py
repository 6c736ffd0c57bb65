"""The fault table (tests/faults) can fail: it notices other losses, other weights and missing steps."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.faults.faults import list_faults
from tests.faults.scene import STEPS, Failure, Outcome, Result, Start
from tests.faults.table import Fault, Played, make_markdown, make_rows


def write_run(run: Path, loss: float = 1.0, weight: float = 0.5, skip: int = 0) -> Path:
    """What a training run leaves, without a training."""
    for stage, count in STEPS.items():
        (run / stage / "final").mkdir(parents=True)
        lines = [{"step": step, "loss": loss} for step in range(1, count + 1) if step != skip]
        lines.append({"step": count, "eval_loss": loss})
        (run / stage / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        save_file({"w": np.full(3, weight, np.float32)}, run / stage / "final" / "model.safetensors")
    return run


def test_a_difference_is_noticed(tmp_path: Path) -> None:
    measure = Result.read(write_run(tmp_path / "measure"))
    measure.check_equal(Result.read(write_run(tmp_path / "same")))
    for name, other in {"loss": {"loss": 1.0001}, "nan": {"loss": float("nan")}, "weight": {"weight": 0.501}}.items():
        with pytest.raises(Failure, match="differ"):
            Result.read(write_run(tmp_path / name, **other)).check_equal(measure)
    with pytest.raises(Failure, match="logged the steps"):
        Result.read(write_run(tmp_path / "skipped", skip=7))


def test_steps_are_counted_over_both_stages(tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    steps.write_text("train pretrain 9\nend pretrain 10\nend pretrain 12\ntrain finetune 0\nend finetune 1\n")
    start = Start(SimpleNamespace(pid=0), tmp_path / "printed", steps)
    assert (start.begun, start.done) == (9, 13)


@pytest.mark.parametrize(
    ("code", "printed", "said"),
    [
        (2, "loading\nerror: the disk is full\nmore\n", "error: the disk is full"),
        (1, "error: x\nTraceback (most recent call last):\nKeyError: 'a'\n", "Traceback: KeyError: 'a'"),
        (130, "a\nstopped\n\n", "stopped"),
        (0, "a\n", ""),
        (-9, "a\n", ""),
    ],
)
def test_what_a_command_said(code: int, printed: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "printed").write_text(printed)
    assert Start(SimpleNamespace(pid=0), tmp_path / "printed", tmp_path / "steps", code).message == said


def test_a_row_shows_all_its_times(tmp_path: Path) -> None:
    fault = Fault("SIGKILL", "in a step", lambda scene, measure: None)
    first = Start(SimpleNamespace(pid=0), tmp_path / "printed", tmp_path / "steps", -9)
    good = [Played(fault, Outcome(first, repeated, 0.0, message="killed")) for repeated in (1, 3)]
    assert make_rows(good) == [["SIGKILL", "in a step", "2", "killed", "1 to 3", "0", "passed"]]
    (row,) = make_rows([*good, Played(fault, failure="3 losses differ")])
    assert row[-1] == "2 of 3 passed; FAILED: 3 losses differ" and "FAILED" in make_markdown([row])


def test_twenty_kills_and_ten_stops_are_played() -> None:
    names = [fault.name for fault in list_faults()]
    assert names.count("SIGKILL") >= 20 and names.count("SIGTERM") >= 10
    assert {"disk full", "image vanishes", "data worker killed", "one of two ranks killed"} <= set(names)
    assert {"changed data", "clock skew", "read-only cache", "second run in the directory"} <= set(names)
