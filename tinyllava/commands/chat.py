"""`tinyllava chat CHECKPOINT [IMAGE ...]`: a conversation with a checkpoint. Answers are printed as they are generated.

    /image PATH   add this image (a file or a URL) to the next question
    /reset        start a new conversation
    /exit         exit, as Ctrl-D does; Ctrl-C stops an answer

Questions can come from a pipe: `echo "What is it?" | tinyllava chat runs/quickstart cat.png`.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from rich.segment import Segment, Segments

from tinyllava.console import messages, output, show_error
from tinyllava.data.images import open_image
from tinyllava.errors import UserError
from tinyllava.factory import suggest_known
from tinyllava.infer import Session

COMMANDS = ("/image", "/reset", "/exit")


def answer_once(session: Session, text: str, images: list[str], **generation: Any) -> None:
    """Ask one question and write the answer to stdout piece by piece."""
    for piece in session.stream(text, images, **generation):
        output.print(Segments([Segment(piece)]), end="", soft_wrap=True)  # as text, its tabs would become spaces
    output.print()


def answer_lines(session: Session, images: list[str], **generation: Any) -> None:
    """Answer each line until the input ends.

    In a terminal, an error is shown and the conversation continues. Raises UserError for a wrong line from a pipe.
    """
    interactive = sys.stdin.isatty()
    pending_images = list(images)  # the images of the next question
    for image in images:
        open_image(image)  # reports a wrong path before the user types a question
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and history for input())
        messages.print(
            f"{session.path}  {' '.join(COMMANDS)}, Ctrl-D to exit", style="dim", highlight=False, markup=False
        )
    for line in read_lines(interactive):
        try:
            command, _, argument = line.partition(" ")
            if command == "/exit":
                return
            if command == "/reset":
                session.reset()
                pending_images = []
            elif command == "/image":
                open_image(argument.strip())
                pending_images.append(argument.strip())
            elif command.startswith("/") and "/" not in command[1:]:
                raise UserError(f"unknown command {command}{suggest_known(command, COMMANDS)}")
            else:
                answer_once(session, line, pending_images, **generation)
                pending_images = []
        except UserError as error:
            if not interactive:
                raise
            show_error(str(error))
        except KeyboardInterrupt:  # stops this answer, not the conversation
            output.print()


def read_lines(interactive: bool) -> Iterator[str]:
    """Yield the lines that the user types or that come from a pipe, without empty ones."""
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
