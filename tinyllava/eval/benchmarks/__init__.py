"""What a benchmark is: one pure-Python file here, and THE FILE NAME IS THE KEY.

A file `NAME.py` defines

    TITLE, FOLDER, SCORER   its name in tables; its folder in the LLaVA data root; whose rules these are, and of when
    MAX_NEW_TOKENS          of greedy decoding, as the original's scripts have it
    questions(root) -> list[Question]
                            what to ask, from the official release's files or the original's LLaVA-style folder
    evaluate(root, pairs) -> dict    `pairs` of (Question, answer record, or None where the answer is missing):
        score               the number of the published tables, in their scale; None where only a server can tell
        metric              what that number is
        metrics             everything the official scorer reports, under its names and in its scale
        items               one dict a scored answer: id, image, answer, parsed, gold, score (0..1), category
        unparsed            how many answers the official parser could make nothing of
        files               files for a server or an official tool: name -> text, or what json.dump takes

and the official rules as public functions (`parse`, `normalize`, `score`, `aggregate`, ...). Optional:

    references(root)        `questions` without what only asking needs (prompts, OCR); default: `questions`
    key(record) -> str      joins an answer to its question where question_ids repeat; default: the question_id
    tally(item)             what an item adds to the sums that `score` is made of; default: {score: ..., n: 1}
    headline(sums)          `score` again from those sums, which may be of resampled items; default: 100 x score / n
    from_short_name         `variants(...)`: names like vqav2-val, and the options of the functions above they stand for
    choose_from(question)   what TASK-likelihood chooses from; () where it has to be said in words
    COUNT_DUPLICATES        True: a second answer counts again, as in the official scorer; default: the last wins

An answer record is a dict with question_id, text and, in files of ours and of the original, prompt.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from tinyllava.errors import UserError

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """One question, with all that asking and scoring it need."""

    id: str  # unique within the benchmark
    question_id: str | int  # the release's own, which may repeat; what an answers file says
    text: str = ""  # the prompt, without the image's placeholder; "" when the release at hand has none
    images: tuple[str, ...] = ()  # paths
    answer: Any = None  # gold, in the release's own form; None where it is withheld
    category: str = ""
    options: tuple[str, ...] = ()
    required: bool = True  # False: an answer is taken when there is one
    extra: dict[str, Any] = field(default_factory=dict)  # whatever else this benchmark's scorer reads


def record_of(question: Question) -> dict[str, Any]:
    """What identifies the question in an answers file."""
    return {"question_id": question.question_id, "prompt": question.text}


def item(question: Question, answer: str | None, parsed: Any, score: float | None, /, **more: Any) -> dict[str, Any]:
    """One line of the per-question results."""
    return {
        "id": question.id,
        "image": question.images[0] if question.images else "",
        "answer": answer,
        "parsed": parsed,
        "gold": question.answer,
        "score": score,
        "category": question.category,
        **more,
    }


def result(
    score: float | None,
    metric: str,
    metrics: dict[str, Any],
    items: list[dict[str, Any]],
    unparsed: int = 0,
    files: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What `evaluate` returns."""
    return {
        "score": score,
        "metric": metric,
        "metrics": metrics,
        "items": items,
        "unparsed": unparsed,
        "files": files or {},
    }


def fingerprint(questions: Iterable[Question]) -> str:
    """A hash of what is asked about, in any order: ids, names of pictures, and the right answers."""
    facts = sorted((q.id, [PurePath(image).name for image in q.images], repr(q.answer)) for q in questions)
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; 0 of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def tally(item: dict[str, Any]) -> dict[str, float]:
    """What an item adds to the sums of a plain mean."""
    return {"score": item["score"], "n": 1}


def headline(sums: dict[str, float]) -> float:
    """The plain mean in percent, from the sums; 0 of nothing."""
    return 100 * sums["score"] / sums["n"] if sums.get("n") else 0.0


def variants(known: dict[str, dict[str, Any]]) -> Callable[[str], dict[str, Any] | None]:
    """`from_short_name` of a benchmark with these variants: textvqa-test-no-ocr is {split: test, ocr: False}."""

    def from_short_name(name: str) -> dict[str, Any] | None:
        benchmark, _, rest = name.partition("-")
        options: dict[str, Any] = {}
        while rest:
            word = max((one for one in known if f"{rest}-".startswith(f"{one}-")), key=len, default=None)
            if word is None:
                raise UserError(f"{benchmark} has no variant '{rest}'. Known: {', '.join(known)}.")
            options |= known[word]
            rest = rest[len(word) + 1 :]
        return options or None

    return from_short_name
