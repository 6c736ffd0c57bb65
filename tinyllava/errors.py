"""The error that is written for the user: what was found, what was expected, and what to do.

`tinyllava` shows its message without a traceback (`--debug` shows both) and exits with code 2.
"""


class UserError(Exception):
    """A name, a value, a file or a sample is wrong. The message has one or two lines and says what to do."""
