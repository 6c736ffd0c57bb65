"""The two consoles for everything that the user sees: `output` (stdout) and `messages` (stderr).

Results go to `output`. Log lines, progress and errors go to `messages`. All printing uses these two, so a log line
never breaks a progress bar, and `tinyllava chat ... > answer.txt` writes only the answer.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from tinyllava.errors import cut_words
from tinyllava.failures import announce_failure
from tinyllava.secrets import hide_secrets

# What makes a terminal do something, or show text in another order than it has: control characters (C0 and C1), the
# bidirectional overrides, and halves of surrogate pairs, which cannot be written.
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class SafeConsole(Console):
    """A console that no text can control. Records, answers, file names and names on the Hub are not trusted."""

    def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
        """The segments of a renderable, with ? in place of what would control the terminal."""
        for segment in super().render(*args, **kwargs):
            is_unsafe = not segment.control and UNSAFE.search(segment.text)
            yield Segment(neutralise(segment.text), segment.style) if is_unsafe else segment


def neutralise(text: str) -> str:
    """The text with ? in place of each character that would control a terminal. Line breaks and tabs stay."""
    return UNSAFE.sub("?", text)


# emoji: rich would turn `:smile:` in an answer or a path into a picture
output = SafeConsole(emoji=False)
messages = SafeConsole(stderr=True, emoji=False)


def is_main_process() -> bool:
    """Whether this process writes files and prints: rank 0, or the only process."""
    return int(os.environ.get("RANK", 0)) == 0


class LogLines(logging.Handler):
    """Print log records as plain lines above a progress bar. Warnings and errors start with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one log record."""
        style = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}.get(record.levelname)
        level = (f"{record.levelname.lower()}: ", style) if style else ""
        text = hide_secrets(self.format(record))
        messages.print(Text.assemble(level, (text, "" if style else "dim")), soft_wrap=True)


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
    text = hide_secrets(text)
    if not announce_failure(text):
        return
    text = cut_words(text)
    messages.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def show_traceback(error: BaseException) -> None:
    """Print the traceback of an error on stderr."""
    messages.print(Text(hide_secrets("".join(traceback.format_exception(error)))), soft_wrap=True)


def guard_tracebacks() -> None:
    """Show the traceback of an error that nothing catches by `show_traceback`, too."""
    sys.excepthook = lambda _, error, __: show_traceback(error)


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
