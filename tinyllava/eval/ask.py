"""From questions to answers.jsonl: one line an answer, as they come, and on from there after a kill.

Lines hold nothing but the question's ids, its prompt and the answer, so that a run with interruptions leaves the same
lines as one without, up to their order.
"""

import json
import logging
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from tinyllava.console import messages
from tinyllava.data.sample import IMAGE_PART, IMAGE_TOKEN, Message, Sample
from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Question, record_of
from tinyllava.infer import Session

logger = logging.getLogger("tinyllava")
MADE_WITH = "made_with.json"

Answers = dict[str, dict[str, Any]]  # records by Question.id


def sample_of(question: Question, blind: bool = False) -> Sample:
    """What the model is asked: the pictures before the prompt, as the original puts them; blind, the prompt alone."""
    images = [] if blind else list(question.images)
    text = question.text.replace(IMAGE_TOKEN, "").strip()
    return Sample([Message("user", IMAGE_PART * len(images) + text)], images, question.id)


def ask(
    session: Session,
    questions: Sequence[Question],
    path: Path,
    *,
    blind: bool = False,
    title: str = "",
    progress: bool = True,
    batch_size: int | None = None,
    **generation: Any,
) -> Answers:
    """Ask what `path` does not answer yet, and append each answer to it; returns the answers to `questions`."""
    given = read_answers(path)
    left = [question for question in questions if question.id not in given]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, _bar(progress and bool(left)) as bar:
        before = len(questions) - len(left)
        row = bar.add_task(title, total=len(questions), completed=before, before=before)
        samples = [sample_of(question, blind) for question in left]
        for index, text in session.generate_each(samples, batch_size, **generation):
            question = left[index]
            given[question.id] = {"id": question.id, **record_of(question), "text": text}
            file.write(json.dumps(given[question.id], ensure_ascii=False) + "\n")
            file.flush()
            bar.advance(row)
    return {question.id: given[question.id] for question in questions}


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


def write(path: Path, text: str) -> None:
    """Write a file whole: beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def spread(questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions, evenly over the pictures, with all of a picture's: MME scores them together."""
    if limit is None or limit >= len(questions):
        return questions
    groups: dict[Any, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.images or question.id, []).append(question)
    pictures = list(groups.values())
    wanted = min(len(pictures), -(-limit * len(pictures) // len(questions)))
    chosen = [question for at in range(wanted) for question in pictures[at * len(pictures) // wanted]]
    return chosen[:limit]


class _Speed(ProgressColumn):
    """Questions a second and the time left, over the whole run: answers come in bursts, a batch at a time."""

    def render(self, task: Task) -> Text:
        """Empty until the first batch is done."""
        new = task.completed - task.fields["before"]
        if not new or not task.elapsed:
            return Text("")
        left = timedelta(seconds=round((task.total - task.completed) * task.elapsed / new))
        return Text(f"{new / task.elapsed:.1f}/s  {left} left")


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed())
    return Progress(*columns, console=messages, disable=not shown)
