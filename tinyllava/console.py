"""What the user sees: results on `output` (stdout); log lines, progress and errors on `messages` (stderr).

Everything goes through these two, so that a log line never tears a progress bar and `tinyllava chat ... > answer.txt`
holds the answer and nothing else.
"""

import logging

from rich.console import Console
from rich.text import Text

output = Console()
messages = Console(stderr=True)


class LogLines(logging.Handler):
    """Log records as plain lines above whatever progress bar is drawn; warnings and errors say what they are."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        style = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}.get(record.levelname)
        level = (f"{record.levelname.lower()}: ", style) if style else ""
        messages.print(Text.assemble(level, (self.format(record), "" if style else "dim")), soft_wrap=True)


def show_log(main_process: bool, debug: bool = False) -> None:
    """Show what the package logs: everything on the main process, errors alone on the others."""
    logger = logging.getLogger("tinyllava")
    logger.handlers = [LogLines()]
    logger.propagate = False
    logger.setLevel((logging.DEBUG if debug else logging.INFO) if main_process else logging.ERROR)


def show_error(text: str) -> None:
    """`error: ...` on stderr, in one line per line of `text` however narrow the terminal is."""
    messages.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)
