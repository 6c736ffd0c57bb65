"""Your own questions: a JSONL with the fields question_id, image, text, answer[, options, category, accept, metric].

    tinyllava eval CHECKPOINT --tasks path/to/my.jsonl
    tinyllava score path/to/my.jsonl --answers FILE

`image` is a path relative to the file, or a list; leave it out for a question without an image. It can have all other
forms that records can have (docs/images.md). `text` is
the prompt, and nothing is added to it. `metric` says how an answer is scored. The default is choice if there are
`options`, and soft if `answer` is a list. For all other questions, it is yes-no if all their answers are yes or no,
else exact.

    exact    equal to the answer or to one of `accept`; case, a final period and a leading article are ignored
    choice   the right one of `options`, by its text, its letter or both: "blue", "B", "(B) blue", "The answer is B."
    yes-no   the first yes or no among the words
    soft     the share of people who agree, as in VQAv2: three of ten people give the full score
"""

import base64
import re
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinyllava.data.references import is_file_reference, resolve_reference
from tinyllava.errors import UserError
from tinyllava.eval import benchmarks
from tinyllava.eval.benchmarks import Pair, Question, Root, average, drop_missing
from tinyllava.eval.benchmarks._choice import choose_option, normalize
from tinyllava.eval.benchmarks._files import get_field, read_jsonl
from tinyllava.eval.benchmarks._vqa import normalize_m4c

METRICS = {
    "exact": "exact match",
    "choice": "multiple-choice accuracy",
    "yes-no": "yes/no accuracy",
    "soft": "soft accuracy",
}


def read_questions(path: Path) -> list[Question]:
    """Read the questions of a JSONL. Raises UserError for a record that cannot be asked or scored."""
    questions: list[Question] = []
    names: set[str] = set()
    for record in read_jsonl(path):
        question = _build_question(record, path)
        if question.id in names:
            raise UserError(
                f"{path}: question_id {question.question_id!r:.80} occurs twice, but answers are matched by it."
            )
        names.add(question.id)
        questions.append(question)
    if not questions:
        raise UserError(f"{path} contains no questions.")
    plain = [question for question in questions if question.extra["metric"] is None]
    all_yes_no = all(normalize(str(question.answer)) in ("yes", "no") for question in plain)
    for question in plain:
        question.extra["metric"] = "yes-no" if all_yes_no else "exact"
    for question in questions:
        check_question(question, path)
    return questions


def _build_question(record: dict[str, Any], path: Path) -> Question:
    """Build the question of a record. Its metric is None if it depends on the other questions."""
    qid = get_field(record, "question_id", path)
    images = record.get("image") or []
    images = images if isinstance(images, list) else [images]
    try:
        images = tuple(_locate_image(image, path.parent) for image in images if image)
    except UserError as error:
        raise UserError(f"{path}, question {qid!s:.80}: {error}") from None
    answer, options = record.get("answer"), tuple(record.get("options") or ())
    metric = record.get("metric") or ("choice" if options else "soft" if isinstance(answer, list) else None)
    extra = {"accept": tuple(record.get("accept") or ()), "metric": metric}
    text = get_field(record, "text", path)
    return Question(str(qid), qid, text, images, answer, record.get("category") or "", options, extra=extra)


def _locate_image(reference: Any, folder: Path) -> str:
    """The path or URL of an image. One inside the record becomes a data: URL. Relative paths start at `folder`."""
    source = resolve_reference(reference)
    if isinstance(source, bytes):
        return f"data:;base64,{base64.b64encode(source).decode()}"
    return str(folder / source) if is_file_reference(source) else source


def check_question(question: Question, path: Path) -> None:
    """Raise UserError if a question's metric does not fit its answer."""
    metric, answer = question.extra["metric"], question.answer
    shown, options = reprlib.repr(answer), reprlib.repr(list(question.options))
    if metric not in METRICS:
        raise UserError(
            f"{path}, question {question.id:.80}: unknown metric '{metric!s:.80}'. Known: {', '.join(METRICS)}."
        )
    if answer is None:
        return  # such a question is asked but not scored
    if metric == "soft" and not (isinstance(answer, list) and answer):
        raise UserError(f"{path}, question {question.id:.80}: soft needs a list of answers, found {shown}.")
    if metric != "soft" and not isinstance(answer, str | int | float):
        raise UserError(f"{path}, question {question.id:.80}: {metric} needs one answer, found {shown}.")
    if metric == "choice" and match_option(str(answer), question.options) is None:
        raise UserError(f"{path}, question {question.id:.80}: its answer {shown} is not one of {options}.")


def match_option(text: str, options: Sequence[str]) -> str | None:
    """The option, normalised, that an answer names by its text, its letter or both; None if it names none, or two."""
    index = choose_option(text, options)
    return None if index is None else normalize(options[index])


def parse_yes_no(text: str) -> str | None:
    """The first yes or no among the words; None if there is none."""
    match = re.search(r"\b(yes|no)\b", text.lower())
    return match[1] if match else None


def score_soft(prediction: str, answers: Sequence[str]) -> float:
    """The mean over the people of min(1, other people with this answer / 3), as VQAv2 scores ten people.

    Source: Antol et al. 2015; texts are normalised as by EvalAI. With fewer than four people, all others must agree for
    a score of 1. With one person, an answer is right or wrong.
    """
    answer, people = normalize_m4c(prediction), [normalize_m4c(human) for human in answers]
    if len(people) == 1:
        return float(answer == people[0])
    agreeing, required = people.count(answer), min(3, len(people) - 1)
    return average(min(1.0, (agreeing - (person == answer)) / required) for person in people)


def parse(text: str, metric: str, options: Sequence[str] = ()) -> str | None:
    """Parse an answer by the rules of a metric; None if it cannot be read."""
    if metric == "choice":
        return match_option(text, options)
    return {"yes-no": parse_yes_no, "soft": normalize_m4c, "exact": normalize}[metric](text)


def score(
    text: str, answer: Any, metric: str = "exact", options: Sequence[str] = (), accept: Iterable[str] = ()
) -> float:
    """Score an answer in 0..1 by one of METRICS. The right `answer` is a list for soft."""
    if metric == "soft":
        return score_soft(text, answer)
    parsed = parse(text, metric, options)
    return float(parsed is not None and parsed in {parse(str(right), metric, options) for right in (answer, *accept)})


class Benchmark(benchmarks.Benchmark):
    """The questions of a JSONL; the score is the mean of their metrics."""

    title = "Custom"
    scorer = "tinyllava custom 2"
    folder = "custom"
    needs_root = False  # the name of the task is the file
    has_options = True

    def locate(self, root: Root | None, trained_on: Iterable[str] = ()) -> Root:
        """The file of questions. Raises UserError if it does not exist."""
        path = Path(root) if root else None
        if path is None or not path.is_file():
            raise UserError(
                f"custom: give --data FILE.jsonl, or name the file itself as the task; found {root or 'nothing'}."
            )
        return path

    def questions(self, root: Root) -> list[Question]:
        """The questions of the file `root`."""
        return read_questions(Path(root))

    def choose_from(self, question: Question) -> tuple[str, ...]:
        """The texts of the options, or yes and no; () if the answer is free text."""
        return {"choice": question.options, "yes-no": ("Yes", "No")}.get(question.extra["metric"], ())

    def parse(self, text: str, question: Question) -> str | None:
        """Parse an answer by its question's metric."""
        return parse(text, question.extra["metric"], question.options)

    def score(self, text: str, question: Question) -> float:
        """Score an answer by its question's metric."""
        return score(text, question.answer, question.extra["metric"], question.options, question.extra["accept"])

    def evaluate(self, root: Root, pairs: list[Pair]) -> dict[str, Any]:
        """The mean score of all answers, and of each category. Missing answers are left out."""
        items = self.score_answered(pairs)
        metrics = [question.extra["metric"] for question, _ in drop_missing(pairs)]
        for item, metric in zip(items, metrics, strict=True):
            item["metric"] = metric
        result = self.average_items(items)
        if result["score"] is not None:
            result["metric"] = ", ".join(METRICS[name] for name in METRICS if name in metrics)
        return result
