"""Helpers for tests of the command line: run the console script in this process, and a recipe of a few steps."""

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


class CommandResult(NamedTuple):
    """The exit code of a command and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(name="tinyllava")
def run_command_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., CommandResult]]:
    """tinyllava("train", ...) runs the console script in this process and returns its result."""
    for console in (output, messages):  # created at import, when COLUMNS had another value
        monkeypatch.setattr(console, "_width", 100)
    transformers_logging.disable_progress_bar()  # TQDM_DELAY, which hides the bars, is set too late here
    logger = logging.getLogger("tinyllava")
    before = logger.handlers, logger.propagate, logger.level

    def run(*arguments: object, stdin: str = "") -> CommandResult:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        return CommandResult(stopped.value.code, *capsys.readouterr())

    yield run
    logger.handlers, logger.propagate, logger.level = before
    transformers_logging.enable_progress_bar()


def recipe(pictures: Path, **changes: object) -> dict:
    """Make a recipe of two stages on tiny parts, with a few steps each. The second stage trains an adapter."""
    trainer = {
        "learning_rate": 1e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "report_to": "none",
    }
    settings = {"global_batch_size": 4, "trainer": trainer}
    lora = {"llm": {"lora": {"r": 4, "alpha": 8}, "lr": 5e-3}}
    stages = {
        "pretrain": {"template": "pretrain", "data": [{"path": str(pictures / "captions.json")}], **settings},
        "finetune": {"data": [{"path": str(pictures / "instructions.json")}], "tune": lora, **settings},
    }
    return {"model": tiny_model(max_length=256), "stages": stages, **changes}


def write_recipe(folder: Path, content: dict) -> Path:
    """Write a recipe and return its path."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def assert_refused(result: CommandResult, *facts: str) -> None:
    """Check that a command failed with an error of one or two lines that contains `facts`.

    Before the error, only the log lines of earlier steps are allowed.
    """
    assert result.code == 2 and result.out == "", result
    lines = result.err.strip().splitlines()
    while lines and lines[0].startswith("stage "):
        lines = lines[1:]
    assert 1 <= len(lines) <= 2 and lines[0].startswith("error: "), result.err
    for fact in facts:
        assert fact in result.err, result.err
