"""The two consoles for everything that the user sees: `output` (stdout) and `messages` (stderr).

Results go to `output`. Log lines, progress and errors go to `messages`. All printing uses these two, so a log line
never breaks a progress bar, and `tinyllava chat ... > answer.txt` writes only the answer.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from tinyllava.failures import announce_failure

output = Console()
messages = Console(stderr=True)


def is_main_process() -> bool:
    """Whether this process writes files and prints: rank 0, or the only process."""
    return int(os.environ.get("RANK", 0)) == 0


class LogLines(logging.Handler):
    """Print log records as plain lines above a progress bar. Warnings and errors start with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one log record."""
        style = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}.get(record.levelname)
        level = (f"{record.levelname.lower()}: ", style) if style else ""
        messages.print(Text.assemble(level, (self.format(record), "" if style else "dim")), soft_wrap=True)


def show_log(main_process: bool, debug: bool = False) -> None:
    """Show what the package logs: everything on the main process, only errors on the others."""
    logger = logging.getLogger("tinyllava")
    logger.handlers = [LogLines()]
    logger.propagate = False
    logger.setLevel((logging.DEBUG if debug else logging.INFO) if main_process else logging.ERROR)


def show_error(text: str) -> None:
    """Print `error: TEXT` on stderr. Lines of `text` are not wrapped, so that they can be searched and copied.

    A word of more than 1,000 characters is the content of a file, for example base64. It is cut.

    Of several processes that fail in the same way, one prints.
    """
    if not announce_failure(text):
        return
    text = re.sub(r"\S{1000,}", lambda word: f"{word[0][:60]}... ({len(word[0]):,} characters)", text)
    messages.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Hide transformers' own reports: our message says the same in one line."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def silence_progress(silent: bool = True) -> Iterator[None]:
    """Hide the progress bars of `datasets`, if `silent`."""
    import datasets

    if not silent or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
