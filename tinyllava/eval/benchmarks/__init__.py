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
    headline(items)         `score` again from (resampled) items; default: 100 x the mean of their scores
    COUNT_DUPLICATES        True: a second answer counts again, as in the official scorer; default: the last wins

An answer record is a dict with question_id, text and, in files of ours and of the original, prompt.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

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


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; 0 of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0
