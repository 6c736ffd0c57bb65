"""Stamps: the held-out test of the embedded dataset, which says per category what a small model has learned to see.

    tinyllava eval runs/quickstart --tasks stamps                    # the tier it was trained on
    tinyllava eval CHECKPOINT --tasks stamps --data stamps:small     # or a folder with test.jsonl

Answers are a word or two and must be the right ones, but for case, a period at the end and an article before. A test of
your own can have the same form: question_id, image, text, answer, category[, accept, options] in lines of test.jsonl.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Question, item, mean, result
from tinyllava.eval.benchmarks._files import field_of, find, need, read_jsonl

TITLE = "Stamps"
FOLDER = "stamps"
SCORER = "tinyllava stamps 1"
MAX_NEW_TOKENS = 32
BLIND = True  # a score here means little without what the model guesses from the question alone

FILE = "test.jsonl"
TIERS = ("tiny", "small", "full")


def locate(root: str | Path | None, trained_on: Iterable[str] = ()) -> Path:
    """The folder of test.jsonl: `root`'s, else the tier named in `root` or in the data that the model was trained on.

    A tier is composed on first use, the same on every machine. Raises UserError when nothing names one.
    """
    named = [re.match(rf"stamps:({'|'.join(TIERS)})\b", str(name)) for name in [root or "", *trained_on]]
    if root and not named[0] and find(root, FOLDER, FILE):
        return need(root, FOLDER, FILE).parent
    tier = next((match[1] for match in named if match), None)
    if tier is None:
        raise UserError(
            f"stamps: which test? There is no {FILE} in {root or 'a data folder'}, and the model was not trained on"
            f" stamps. Give --data stamps:{TIERS[0]} (or {', '.join(TIERS[1:])})."
        )
    from tinyllava.data.cache import cache_root
    from tinyllava.data.sources.stamps import prepared

    return prepared(tier, cache_root())


def questions(root: str | Path) -> list[Question]:
    """The questions of `test.jsonl`; pictures lie beside it."""
    path = need(root, FOLDER, FILE, hint="A tier's is made by `--data stamps:tiny`.")
    found = []
    for record in read_jsonl(path):
        qid = field_of(record, "question_id", path)
        found.append(
            Question(
                str(qid),
                qid,
                field_of(record, "text", path),
                (str(path.parent / record["image"]),) if record.get("image") else (),
                field_of(record, "answer", path),
                field_of(record, "category", path),
                tuple(record.get("options") or ()),
                extra={"accept": tuple(record.get("accept") or ())},
            )
        )
    return found


def normalize(text: str) -> str:
    """Lower case, single spaces, no period at the end, no article before: "A  cat." is "cat"."""
    text = " ".join(text.lower().split()).rstrip(".").rstrip()
    return re.sub(r"^(a|an|the) (?=\S)", "", text)


def parse(text: str, options: Sequence[str] = ()) -> str:
    """The normalised answer; of a multiple choice also by its letter ("B", "b.", "(B)"), unless that is an option."""
    said = normalize(text)
    known = [normalize(option) for option in options]
    letter = re.fullmatch(r"\(?([a-z])\)?", said)
    if letter and said not in known and ord(letter[1]) - ord("a") < len(known):
        return known[ord(letter[1]) - ord("a")]
    return said


def score(prediction: str, answer: str, accept: Iterable[str] = (), options: Sequence[str] = ()) -> float:
    """1 when the prediction is the answer, or one of those that are also accepted."""
    return float(parse(prediction, options) in {parse(right, options) for right in (answer, *accept)})


def aggregate(items: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{accuracy, n} of each category, in the order of the test."""
    groups: dict[str, list[float]] = {}
    for one in items:
        groups.setdefault(one["category"], []).append(one["score"])
    return {name: {"accuracy": mean(scores), "n": len(scores)} for name, scores in groups.items()}


def evaluate(root: str | Path, pairs: list[tuple[Question, dict[str, Any] | None]]) -> dict[str, Any]:
    """Percent right of all questions, and the accuracy of each category. A missing answer is left out."""
    items = []
    for question, record in pairs:
        if record is not None:
            right = score(record["text"], question.answer, question.extra["accept"], question.options)
            items.append(item(question, record["text"], parse(record["text"], question.options), right))
    accuracy = mean(one["score"] for one in items)
    return result(100 * accuracy, "accuracy over all questions", {"per_category": aggregate(items)}, items)
