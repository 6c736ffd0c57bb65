"""Ask a model questions and append each answer to answers.jsonl at once. After a kill, run it again to resume.

Several processes (workers.py) can share the questions. Each takes one chunk at a time and writes its own file. At the
end, the first process joins the files.
"""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
from rich.progress import Task as BarTask
from rich.text import Text

from tinyllava.console import messages
from tinyllava.data.sample import IMAGE_PART, IMAGE_TOKEN, Message, Sample
from tinyllava.eval.answers import Answers, join_process_files, name_process_file, read_answers, to_line
from tinyllava.eval.benchmarks import Question, to_answer_fields
from tinyllava.eval.choose import Choice
from tinyllava.eval.workers import Workers
from tinyllava.infer import Session

CHUNKS = 8  # for each process; with fewer, one process would wait long for another at the end


def to_sample(question: Question, blind: bool = False) -> Sample:
    """The sample that the model is asked: the images, then the prompt, as in the original. `blind`: only the prompt."""
    images = [] if blind else list(question.images)
    text = question.text.replace(IMAGE_TOKEN, "").strip()
    return Sample([Message("user", IMAGE_PART * len(images) + text)], images, question.id)


def ask_questions(
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
    """Ask the questions that `path` does not answer yet, and append each answer to it.

    Returns the answers to all `questions`. With several processes, each asks some of the questions, and all return when
    every question is answered.
    """
    workers = workers or Workers()
    path.parent.mkdir(parents=True, exist_ok=True)
    if workers.is_main:
        join_process_files(path)
    workers.meet(f"{path} joined")
    answers = read_answers(path)
    remaining = [question for question in questions if question.id not in answers]
    process_file = path if workers.count == 1 else name_process_file(path, workers.rank)
    show_bar = progress and workers.is_main and bool(remaining)
    with process_file.open("a", encoding="utf-8") as file, _build_bar(show_bar) as bar:
        before = len(questions) - len(remaining)
        row = bar.add_task(title, total=len(questions), completed=before, before=before)
        for chunk in workers.take(f"{path} taken", split_chunks(remaining, workers.count)):
            samples = [to_sample(question, blind) for question in chunk]
            for index, text in _answer_chunk(session, chunk, samples, choice, batch_size, **generation):
                question = chunk[index]
                answers[question.id] = {"id": question.id, **to_answer_fields(question), "text": text}
                file.write(to_line(answers[question.id]))
                file.flush()
                bar.update(row, completed=before + workers.add(f"{path} answered", 1))
    workers.meet(f"{path} answered by all")
    if workers.count > 1 and workers.is_main:
        join_process_files(path)
        answers = read_answers(path)
    workers.meet(f"{path} whole")
    return {question.id: answers[question.id] for question in questions if question.id in answers}


def _answer_chunk(
    session: Session,
    questions: Sequence[Question],
    samples: Sequence[Sample],
    choice: Choice | None,
    batch_size: int | None,
    **generation: Any,
) -> Iterator[tuple[int, str]]:
    """Yield (index, answer). With a `choice`, the answer is the likeliest of the options; without, it is generated."""
    options = [choice.list_options(question) if choice else () for question in questions]
    closed = [index for index in range(len(questions)) if options[index]]
    generated = [index for index in range(len(questions)) if not options[index]]
    if closed:
        closed_samples, closed_options = [samples[index] for index in closed], [options[index] for index in closed]
        for position, likelihoods in session.loglikelihood_each(closed_samples, closed_options, batch_size):
            yield closed[position], choice.pick(options[closed[position]], likelihoods)
    for position, text in session.generate_each([samples[index] for index in generated], batch_size, **generation):
        yield generated[position], text


def split_chunks(questions: Sequence[Question], processes: int) -> list[list[Question]]:
    """Split the questions into chunks, which a process takes one at a time. One process alone takes everything.

    The questions on an image stay in one chunk, so that no image is encoded by two processes.
    """
    size = len(questions) if processes == 1 else -(-len(questions) // (CHUNKS * processes))
    chunks: list[list[Question]] = []
    for group in group_by_image(questions):
        if not chunks or len(chunks[-1]) >= size:
            chunks.append([])
        chunks[-1] += group
    return chunks


def group_by_image(questions: Sequence[Question]) -> list[list[Question]]:
    """The questions in groups that have the same images. A question without an image is a group of its own."""
    groups: dict[Any, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.images or question.id, []).append(question)
    return list(groups.values())


def pick_evenly(questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions, spread evenly over the images. The questions on an image stay together.

    MME needs that: it scores both questions on an image as a pair.
    """
    if limit is None or limit >= len(questions):
        return questions
    groups = group_by_image(questions)
    count = min(len(groups), -(-limit * len(groups) // len(questions)))
    picked = [question for number in range(count) for question in groups[number * len(groups) // count]]
    return picked[:limit]


class _Speed(ProgressColumn):
    """Show questions per second and the time left. Both are means over the run, because answers come in batches."""

    def render(self, task: BarTask) -> Text:
        """The text of the column; it is empty until the first batch is done."""
        new = task.completed - task.fields["before"]
        if not new or not task.elapsed:
            return Text("")
        left = timedelta(seconds=round((task.total - task.completed) * task.elapsed / new))
        return Text(f"{new / task.elapsed:.1f}/s  {left} left")


def _build_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed())
    return Progress(*columns, console=messages, disable=not shown)
