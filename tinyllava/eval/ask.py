"""From questions to answers.jsonl: one line an answer, as they come, and on from there after a kill.

Several processes (workers.py) take chunks of questions in turns, each writing a file of its own; the first joins them.
"""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from tinyllava.console import messages
from tinyllava.data.sample import IMAGE_PART, IMAGE_TOKEN, Message, Sample
from tinyllava.eval.answers import Answers, join_parts, line_of, part_of, read_answers
from tinyllava.eval.benchmarks import Question, record_of
from tinyllava.eval.choose import Choice
from tinyllava.eval.workers import Workers
from tinyllava.infer import Session

CHUNKS = 8  # for each process, so that none waits long for another at the end


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
    choice: Choice | None = None,
    workers: Workers | None = None,
    **generation: Any,
) -> Answers:
    """Ask what `path` does not answer yet, and append each answer to it; returns the answers to `questions`.

    Of several processes each asks a part, and all return when all is answered.
    """
    workers = workers or Workers()
    path.parent.mkdir(parents=True, exist_ok=True)
    if workers.is_main:
        join_parts(path)
    workers.meet(f"{path} joined")
    given = read_answers(path)
    left = [question for question in questions if question.id not in given]
    own = path if workers.count == 1 else part_of(path, workers.rank)
    with own.open("a", encoding="utf-8") as file, _bar(progress and workers.is_main and bool(left)) as bar:
        before = len(questions) - len(left)
        row = bar.add_task(title, total=len(questions), completed=before, before=before)
        for chunk in workers.take(f"{path} taken", chunks(left, workers.count)):
            samples = [sample_of(question, blind) for question in chunk]
            for index, text in _answers(session, chunk, samples, choice, batch_size, **generation):
                question = chunk[index]
                given[question.id] = {"id": question.id, **record_of(question), "text": text}
                file.write(line_of(given[question.id]))
                file.flush()
                bar.update(row, completed=before + workers.add(f"{path} answered", 1))
    workers.meet(f"{path} answered by all")
    if workers.count > 1 and workers.is_main:
        join_parts(path)
        given = read_answers(path)
    workers.meet(f"{path} whole")
    return {question.id: given[question.id] for question in questions if question.id in given}


def _answers(
    session: Session,
    questions: Sequence[Question],
    samples: Sequence[Sample],
    choice: Choice | None,
    batch_size: int | None,
    **generation: Any,
) -> Iterator[tuple[int, str]]:
    """(index, answer): the likeliest of a question's options where a choice is asked for, else what the model says."""
    options = [choice.options(question) if choice else () for question in questions]
    closed = [index for index, own in enumerate(options) if own]
    spoken = [index for index, own in enumerate(options) if not own]
    if closed:
        asked, own = [samples[index] for index in closed], [options[index] for index in closed]
        for at, found in session.loglikelihood_each(asked, own, batch_size):
            yield closed[at], choice.pick(own[at], found)
    for at, text in session.generate_each([samples[index] for index in spoken], batch_size, **generation):
        yield spoken[at], text


def chunks(questions: Sequence[Question], processes: int) -> list[list[Question]]:
    """What a process takes at a time: all of them if it is alone, else some pictures with all their questions."""
    size = len(questions) if processes == 1 else -(-len(questions) // (CHUNKS * processes))
    made: list[list[Question]] = []
    for group in by_picture(questions):
        if not made or len(made[-1]) >= size:
            made.append([])
        made[-1] += group
    return made


def by_picture(questions: Sequence[Question]) -> list[list[Question]]:
    """Questions on the same pictures together; each of those without a picture alone."""
    groups: dict[Any, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.images or question.id, []).append(question)
    return list(groups.values())


def spread(questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions, evenly over the pictures, with all of a picture's: MME scores them together."""
    if limit is None or limit >= len(questions):
        return questions
    pictures = by_picture(questions)
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
