"""answers.jsonl: one line an answer, as they come; a torn last line is repaired, and parts of several processes joined.

Lines hold nothing but the question's ids, its prompt and the answer, so that a run with interruptions leaves the same
lines as one without, up to their order.
"""

import json
import logging
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.results import write

logger = logging.getLogger("tinyllava")
MADE_WITH = "made_with.json"

Answers = dict[str, dict[str, Any]]  # records by Question.id


def part_of(path: Path, rank: int) -> Path:
    """Where the process `rank` of several writes its answers."""
    return path.with_name(f"{path.stem}.part-{rank}{path.suffix}")


def join_parts(path: Path) -> None:
    """Append to `path` what several processes left beside it. Killed at any moment, it loses and repeats nothing."""
    given = read_answers(path)
    for part in sorted(path.parent.glob(f"{path.stem}.part-*{path.suffix}")):
        more = {name: record for name, record in read_answers(part).items() if name not in given}
        with path.open("a", encoding="utf-8") as file:
            file.writelines(line_of(record) for record in more.values())
        given |= more
        part.unlink()


def line_of(record: dict[str, Any]) -> str:
    """A line of the file."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_answers(path: Path) -> Answers:
    """The answers in `path` (none if it is not there); a last line that a kill tore is cut off.

    Raises UserError for any other line that is no answer.
    """
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        logger.warning("%s: its last line was torn; that question is asked again", path)
        with path.open("rb+") as file:
            file.truncate(whole)
    answers: Answers = {}
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            answers[record["id"]] = record
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number} is no answer: {line[:80]!r}. Remove the line, or the file."
            ) from None
    return answers


def claim(folder: Path, made: dict[str, Any]) -> None:
    """Make `folder` the place for answers made like this; those made otherwise are moved beside it, never mixed."""
    path = folder / MADE_WITH
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != made:
            number = 1
            while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
                number += 1
            folder.rename(aside)
            other = ", ".join(name for name in made if before.get(name) != made[name])
            logger.warning("answers in %s were made with another %s: moved to %s", folder, other, aside.name)
    write(path, json.dumps(made, indent=2) + "\n")
