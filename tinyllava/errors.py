"""The errors that are written for the user: what was found, what was expected, and what to do.

`tinyllava` shows the message of a UserError without a traceback (`--debug` shows both) and exits with code 2.
"""

import re


def cut_words(text: str) -> str:
    """The text with the start of each word of more than 1,000 characters: such a word is the content of a file."""
    return re.sub(r"\S{1000,}", lambda word: f"{word[0][:60]}... ({len(word[0]):,} characters)", text)


class UserError(Exception):
    """A name, a value, a file or a sample is wrong. The message has one or two lines and says what to do."""

    def __str__(self) -> str:
        return cut_words(super().__str__())


class Interrupted(SystemExit):
    """A signal stopped the run. The message says what is saved; `code` is the exit code.

    75 (EX_TEMPFAIL): the same command resumes, so a scheduler can start it again. 130: Ctrl-C. Otherwise 128 + the
    number of the signal: it cannot be resumed. As a SystemExit, it ends a script that does not catch it with this code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message


class WorkerError(UserError):
    """A UserError inside a DataLoader worker.

    torch raises it again in the main process as `Class(text of the traceback)`. Only the message is kept of that text.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rsplit("WorkerError: ", 1)[-1].strip())
