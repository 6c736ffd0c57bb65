"""The one error a user is meant to read: what was found, what was expected, what to do about it.

`tinyllava` shows its message without a traceback (`--debug` shows both) and exits with code 2.
"""


class UserError(Exception):
    """A name, a file or a sample is not what it should be. The message takes one or two lines and holds the remedy."""
