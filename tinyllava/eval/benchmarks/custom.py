"""Your own questions: a JSONL of question_id, image, text, answer[, options, category, accept, metric].

    tinyllava eval CHECKPOINT --tasks path/to/my.jsonl
    tinyllava score path/to/my.jsonl --answers FILE

`image` is a path beside the file, or a list of them, or absent; `text` is the prompt, as it is. `metric` says how an
answer is scored; where it does not, options mean choice, a list of answers means soft, answers that are all yes or no
mean yes-no, and all else is exact:

    exact    the answer, or one of `accept`, but for case, a period at the end and an article before
    choice   the right one of `options`, by its text or its letter: "B", "b.", "(B)"
    yes-no   the first yes or no among the words
    soft     the share of people who agree, as in VQAv2: 1 for three others of ten
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Question, item, mean, result
from tinyllava.eval.benchmarks._files import field_of, read_jsonl
from tinyllava.eval.benchmarks._vqa import normalize_m4c

TITLE = "Custom"
FOLDER = "custom"
SCORER = "tinyllava custom 1"
MAX_NEW_TOKENS = 128

METRICS = {
    "exact": "exact match",
    "choice": "multiple-choice accuracy",
    "yes-no": "yes/no accuracy",
    "soft": "soft accuracy",
}


def locate(root: str | Path | None, trained_on: Iterable[str] = ()) -> Path:
    """The file of questions. Raises UserError when it is not there."""
    path = Path(root) if root else None
    if path is None or not path.is_file():
        raise UserError(f"custom: give --data FILE.jsonl, or the file itself as the task; found {root or 'nothing'}.")
    return path


def questions(root: str | Path) -> list[Question]:
    """The questions of the file `root`."""
    return read(Path(root))


def read(path: Path) -> list[Question]:
    """The questions of a JSONL in this form. Raises UserError for a record that cannot be asked or scored."""
    found: list[Question] = []
    names: set[str] = set()
    for record in read_jsonl(path):
        qid = field_of(record, "question_id", path)
        if str(qid) in names:
            raise UserError(f"{path}: question_id {qid!r} is there twice. Answers are matched by it.")
        names.add(str(qid))
        images = record.get("image") or []
        images = tuple(str(path.parent / image) for image in ([images] if isinstance(images, str) else images))
        answer, options = record.get("answer"), tuple(record.get("options") or ())
        metric = record.get("metric") or ("choice" if options else "soft" if isinstance(answer, list) else None)
        extra = {"accept": tuple(record.get("accept") or ()), "metric": metric}
        text = field_of(record, "text", path)
        found.append(Question(str(qid), qid, text, images, answer, record.get("category") or "", options, extra=extra))
    if not found:
        raise UserError(f"{path} holds no questions.")
    plain = [question for question in found if question.extra["metric"] is None]
    yes_no = all(normalize(str(question.answer)) in ("yes", "no") for question in plain)
    for question in plain:
        question.extra["metric"] = "yes-no" if yes_no else "exact"
    for question in found:
        check(question, path)
    return found


def check(question: Question, path: Path) -> None:
    """Raise UserError where a question's metric does not fit its answer."""
    metric, answer = question.extra["metric"], question.answer
    if metric not in METRICS:
        raise UserError(f"{path}, question {question.id}: unknown metric '{metric}'. Known: {', '.join(METRICS)}.")
    if answer is None:
        return  # asked, and not scored
    if metric == "soft" and not (isinstance(answer, list) and answer):
        raise UserError(f"{path}, question {question.id}: soft needs a list of answers, found {answer!r}.")
    if metric != "soft" and not isinstance(answer, str | int | float):
        raise UserError(f"{path}, question {question.id}: {metric} needs one answer, found {answer!r}.")
    if metric == "choice" and choice(str(answer), question.options) is None:
        raise UserError(f"{path}, question {question.id}: its answer {answer!r} is none of {list(question.options)}.")


def normalize(text: str) -> str:
    """Lower case, single spaces, no period at the end, no article before: "A  cat." is "cat"."""
    text = " ".join(text.lower().split()).rstrip(".").rstrip()
    return re.sub(r"^(a|an|the) (?=\S)", "", text)


def choice(text: str, options: Sequence[str]) -> str | None:
    """The option that is meant, by its text or by its letter, unless that is an option itself; else None."""
    said = normalize(text)
    known = [normalize(option) for option in options]
    letter = re.fullmatch(r"\(?([a-z])\)?", said)
    if letter and said not in known and ord(letter[1]) - ord("a") < len(known):
        return known[ord(letter[1]) - ord("a")]
    return said if said in known else None


def yes_no(text: str) -> str | None:
    """The first yes or no among the words, or None."""
    found = re.search(r"\b(yes|no)\b", text.lower())
    return found[1] if found else None


def soft(prediction: str, answers: Sequence[str]) -> float:
    """The mean over the people of min(1, agreeing others / 3), after EvalAI's normaliser; of fewer than four people,
    all others must agree. As VQAv2 (Antol et al. 2015) has it for ten. One person's answer is simply right or wrong."""
    said, people = normalize_m4c(prediction), [normalize_m4c(answer) for answer in answers]
    if len(people) == 1:
        return float(said == people[0])
    agreeing, needed = people.count(said), min(3, len(people) - 1)
    return mean(min(1.0, (agreeing - (person == said)) / needed) for person in people)


def choose_from(question: Question) -> tuple[str, ...]:
    """Its options, by their text; yes and no; nothing where any words may be the answer."""
    return {"choice": question.options, "yes-no": ("Yes", "No")}.get(question.extra["metric"], ())


def parse(text: str, metric: str, options: Sequence[str] = ()) -> str | None:
    """What a metric reads out of an answer; None: nothing."""
    if metric == "choice":
        return choice(text, options)
    return {"yes-no": yes_no, "soft": normalize_m4c, "exact": normalize}[metric](text)


def score(
    text: str, answer: Any, metric: str = "exact", options: Sequence[str] = (), accept: Iterable[str] = ()
) -> float:
    """An answer's score in 0..1 by one of METRICS; `answer` is a list for soft."""
    if metric == "soft":
        return soft(text, answer)
    said = parse(text, metric, options)
    return float(said is not None and said in {parse(str(right), metric, options) for right in (answer, *accept)})


def evaluate(root: str | Path, pairs: list[tuple[Question, dict[str, Any] | None]]) -> dict[str, Any]:
    """Percent right of all answers, and of each category. A missing answer is left out."""
    items = []
    for question, record in pairs:
        if record is not None:
            text, metric, gold = record["text"], question.extra["metric"], question.answer
            parsed = parse(text, metric, question.options)
            right = None if gold is None else score(text, gold, metric, question.options, question.extra["accept"])
            items.append(item(question, text, parsed, right, metric=metric))
    unparsed = sum(one["parsed"] is None for one in items)
    if any(one["score"] is None for one in items):
        return result(None, "no right answers to score by", {}, items, unparsed)
    used = {one["metric"] for one in items}
    metric = ", ".join(METRICS[name] for name in METRICS if name in used)
    return result(100 * mean(o["score"] for o in items), metric, {"per_category": aggregate(items)}, items, unparsed)


def aggregate(items: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{accuracy, n} of each category, in the order of the test."""
    groups: dict[str, list[float]] = {}
    for one in items:
        groups.setdefault(one["category"], []).append(one["score"])
    return {name: {"accuracy": mean(scores), "n": len(scores)} for name, scores in groups.items()}
