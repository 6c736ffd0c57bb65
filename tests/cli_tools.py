"""What tests of the command line share: the console script run in this process, and a recipe of a few steps."""

import io
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from transformers.utils import logging as transformers_logging

from tests.conftest import tiny_model
from tinyllava import cli
from tinyllava.console import messages, output


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(name="tinyllava")
def command_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Said]]:
    """tinyllava("train", ...) runs the console script in this process and returns what it said."""
    for console in (output, messages):  # made at import, when COLUMNS said something else
        monkeypatch.setattr(console, "_width", 100)
    transformers_logging.disable_progress_bar()  # a process of its own has TQDM_DELAY in time for this
    logger = logging.getLogger("tinyllava")
    before = logger.handlers, logger.propagate, logger.level

    def run(*arguments: object, stdin: str = "") -> Said:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        return Said(stopped.value.code, *capsys.readouterr())

    yield run
    logger.handlers, logger.propagate, logger.level = before
    transformers_logging.enable_progress_bar()


def recipe(pictures: Path, **changes: object) -> dict:
    """Two stages on tiny parts, a few steps each; the second trains an adapter."""
    trainer = {
        "learning_rate": 1e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "report_to": "none",
    }
    one = {"global_batch_size": 4, "trainer": trainer}
    lora = {"llm": {"lora": {"r": 4, "alpha": 8}, "lr": 5e-3}}
    stages = {
        "pretrain": {"template": "pretrain", "data": [{"path": str(pictures / "captions.json")}], **one},
        "finetune": {"data": [{"path": str(pictures / "instructions.json")}], "tune": lora, **one},
    }
    return {"model": tiny_model(max_length=256), "stages": stages, **changes}


def written(folder: Path, content: dict) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def assert_refused(said: Said, *facts: str) -> None:
    assert said.code == 2 and said.out == "", said
    lines = said.err.strip().splitlines()
    assert 1 <= len(lines) <= 2 and lines[0].startswith("error: "), said.err
    for fact in facts:
        assert fact in said.err, said.err
