"""Read and write answers.jsonl, which has one line per answer.

A line is appended as soon as its answer is complete. After a kill, an incomplete last line is removed, and the files of
several processes are joined. A line holds only the question's ids, its prompt and the answer. So a run that was
interrupted and resumed leaves the same lines as an uninterrupted one, except for their order.
"""

import json
import logging
from pathlib import Path
from typing import Any

from tinyllava import atomic
from tinyllava.errors import UserError
from tinyllava.files import parse_json, read_json

logger = logging.getLogger("tinyllava")
MADE_WITH = "made_with.json"

Answers = dict[str, dict[str, Any]]  # records by Question.id


def name_process_file(path: Path, rank: int) -> Path:
    """The path of the file, beside `path`, to which the process `rank` of several writes its answers."""
    return path.with_name(f"{path.stem}.part-{rank}{path.suffix}")


def join_process_files(path: Path) -> None:
    """Append to `path` the answers that several processes wrote beside it.

    A kill at any moment loses no answer and repeats none.
    """
    answers = read_answers(path)
    for process_file in sorted(path.parent.glob(f"{path.stem}.part-*{path.suffix}")):
        new = {name: record for name, record in read_answers(process_file).items() if name not in answers}
        with path.open("a", encoding="utf-8") as file:
            file.writelines(to_line(record) for record in new.values())
        answers |= new
        # Deleted last: after a kill before this line, the next call finds the answers in `path` and skips them.
        process_file.unlink()


def to_line(record: dict[str, Any]) -> str:
    """The record as a line of the file."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_answers(path: Path) -> Answers:
    """The answers in `path` ({} if it does not exist). An incomplete last line, left by a kill, is removed.

    Raises UserError for any other line that is not an answer.
    """
    if not path.is_file():
        return {}
    data = path.read_bytes()
    complete = data.rfind(b"\n") + 1  # bytes up to the end of the last complete line
    if complete < len(data):
        logger.warning("%s: its last line was incomplete; that question is asked again", path)
        with path.open("rb+") as file:
            file.truncate(complete)
    answers: Answers = {}
    for number, line in enumerate(data[:complete].split(b"\n")[:-1], start=1):
        try:
            record = parse_json(line)
            answers[record["id"]] = record
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number} is not an answer: {line[:80]!r}. Remove the line, or the file."
            ) from None
    return answers


def read_conditions(folder: Path) -> dict[str, Any]:
    """The conditions under which the answers in `folder` were made; {} if `tinyllava eval` did not write them."""
    path = folder / MADE_WITH
    return read_json(path) if path.is_file() else {}


def claim_folder(folder: Path, conditions: dict[str, Any]) -> None:
    """Write `conditions` into `folder`, for the answers that follow.

    If the folder has answers that were made under other conditions, it is renamed first: NAME.1, NAME.2 and so on.
    """
    if (folder / MADE_WITH).is_file():
        before = read_conditions(folder)
        if before != conditions:
            number = 1
            while (renamed := folder.with_name(f"{folder.name}.{number}")).exists():
                number += 1
            folder.rename(renamed)
            changed = ", ".join(name for name in conditions if before.get(name) != conditions[name])
            logger.warning(
                "the answers in %s were made with another %s: they are moved to %s", folder, changed, renamed.name
            )
    atomic.write_text(folder / MADE_WITH, json.dumps(conditions, indent=2) + "\n")
