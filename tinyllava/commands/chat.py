"""`tinyllava chat CHECKPOINT [IMAGE ...]`: talk to a checkpoint, several turns, the answer as it is made.

    /image PATH   the next question is about this picture as well (a file or a URL)
    /reset        begin anew
    /exit         so does Ctrl-D; Ctrl-C stops an answer

Lines from a pipe are questions too: `echo "What is it?" | tinyllava chat runs/quickstart cat.png`.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from tinyllava.console import messages, output, show_error
from tinyllava.data.images import open_image
from tinyllava.errors import UserError
from tinyllava.factory import nearest
from tinyllava.infer import Session

COMMANDS = ("/image", "/reset", "/exit")


def say(session: Session, text: str, images: list[str], **generation: Any) -> None:
    """Ask once and write the answer to stdout piece by piece."""
    for piece in session.stream(text, images, **generation):
        output.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    output.print()


def talk(session: Session, images: list[str], **generation: Any) -> None:
    """Answer line by line until the input ends. An error ends it when the lines come from a pipe."""
    interactive = sys.stdin.isatty()
    waiting = list(images)  # shown with the next question
    for picture in images:
        open_image(picture)  # a wrong path is known before the first question is typed
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and history for input())
        messages.print(f"{session.path}  {' '.join(COMMANDS)}, Ctrl-D to leave", style="dim", highlight=False)
    for line in lines(interactive):
        try:
            command, _, argument = line.partition(" ")
            if command == "/exit":
                return
            if command == "/reset":
                session.reset()
                waiting = []
            elif command == "/image":
                open_image(argument.strip())
                waiting.append(argument.strip())
            elif command.startswith("/") and "/" not in command[1:]:
                raise UserError(
                    f"unknown command {command}{nearest(command, list(COMMANDS))} Known: {', '.join(COMMANDS)}."
                )
            else:
                say(session, line, waiting, **generation)
                waiting = []
        except UserError as error:
            if not interactive:
                raise
            show_error(str(error))
        except KeyboardInterrupt:  # stops this answer, not the talk
            output.print()


def lines(interactive: bool) -> Iterator[str]:
    """What the user types, or what comes through a pipe, without empty lines."""
    if not interactive:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            output.print()
            return
        if line:
            yield line
