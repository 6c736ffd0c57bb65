"""VQAv2: short answers to 214,354 questions on COCO val2014 (scored here), or to test-dev (scored by EvalAI).

Published numbers are of test-dev, for which `evaluate` makes the upload file of EvalAI challenge 830, and no score.

    tinyllava eval CHECKPOINT --tasks vqav2 --data ROOT
    tinyllava score vqav2 --data ROOT --answers results.json

Rules: GT-Vision-Lab/VQA `vqaEval.py` and `vqa.py`, a013f00 (Python 2); upload: `convert_vqav2_for_submission.py` of
TinyLLaVA 53f12c7.
"""

import functools
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import SHORT_ANSWER, Question, item, mean, result, variants
from tinyllava.eval.benchmarks import _hub as hub
from tinyllava.eval.benchmarks._files import field_of, find, need, read_json, read_jsonl, remedy
from tinyllava.eval.benchmarks._vqa import leave_one_out, normalize_m4c, normalize_words, one_line, strip_punctuation

TITLE = "VQAv2"
FOLDER = "vqav2"
SCORER = "GT-Vision-Lab/VQA a013f00"
MAX_NEW_TOKENS = 128

SPLITS = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}
HUB = {
    "val": "data/validation-*.parquet",
    "test-dev": "data/testdev-*.parquet",
    "test": "data/test-*.parquet",
}

from_short_name = variants({split: {"split": split} for split in SPLITS})


def questions(root: str | Path, split: str | None = None) -> list[Question]:
    """The questions of `split`; None takes the first of val, test-dev and test that is there.

    Reads LLaVA's `llava_vqav2_mscoco_{test-dev2015,test2015}.jsonl`, or the official
    `v2_OpenEnded_mscoco_*_questions.json` and for val `v2_mscoco_val2014_annotations.json`, or the Hub's copy.
    """
    if split is not None and split not in SPLITS:
        raise UserError(f"unknown VQAv2 split '{split}'. Known: {', '.join(SPLITS)}.")
    wanted = [split] if split else list(SPLITS)
    found = next((asked for one in wanted if (asked := _asked(root, one))), [])
    if not found:
        names = [name for one in wanted for name in (*_files(one), HUB[one])]
        need(root, FOLDER, *names, hint=remedy("vqav2"))
    return found


def _files(split: str) -> tuple[str, str]:
    """LLaVA's and the official questions of a split."""
    return f"llava_vqav2_mscoco_{SPLITS[split]}.jsonl", f"v2_OpenEnded_mscoco_{SPLITS[split]}_questions.json"


def _asked(root: str | Path, split: str) -> list[Question]:
    """The questions of one split; none where it is not there."""
    name = SPLITS[split].replace("test-dev", "test")
    path, folder = find(root, FOLDER, *_files(split)), find(root, FOLDER, name)
    copies = [] if path and folder else _hub_rows(root, split, None if folder else name)
    pictures = {} if folder else hub.pictures(copies)
    folder = folder or (path.parent if path else Path(root) / FOLDER) / name
    if path and path.suffix == ".jsonl":
        return [
            Question(
                str(q["question_id"]),
                q["question_id"],
                q["text"],
                (pictures.get(q["image"], str(folder / q["image"])),),
            )
            for q in read_jsonl(path)
        ]
    gold = {q["question_id"]: q for q in copies}
    if path and split == "val":
        gold = _annotations(path.parent / f"v2_mscoco_{SPLITS[split]}_annotations.json")
    found = []
    for q in field_of(read_json(path), "questions", path) if path else copies:
        picture = _picture(name, q)
        found.append(
            Question(
                str(q["question_id"]),
                q["question_id"],
                f"{q['question']}\n{SHORT_ANSWER}",
                (pictures.get(picture, str(folder / picture)),),
                gold.get(q["question_id"], {}).get("answers") or None,
                gold.get(q["question_id"], {}).get("answer_type") or "",
                extra={"question_type": gold.get(q["question_id"], {}).get("question_type") or ""},
            )
        )
    return found


def _picture(folder: str, question: dict[str, Any]) -> str:
    """What COCO calls it."""
    return f"COCO_{folder}_{question['image_id']:012d}.jpg"


def _hub_rows(root: str | Path, split: str, folder: str | None) -> list[dict[str, Any]]:
    """The Hub's rows, with their pictures under COCO's names unless `folder` is None."""
    columns = ("question_id", "image_id", "question", "answers", "answer_type", "question_type")
    name = functools.partial(_picture, folder) if folder else None
    return hub.rows(hub.tables(root, FOLDER, HUB[split]), *columns, name=name)


def _annotations(path: Path) -> dict[int, dict[str, Any]]:
    if not path.exists():
        raise UserError(f"expected {path}, with the answers to the val2014 questions beside it. {remedy('vqav2')}")
    return {a["question_id"]: a for a in field_of(read_json(path), "annotations", path)}


@functools.lru_cache(maxsize=1 << 16)
def normalize(text: str) -> str:
    """The official normaliser: punctuation, then lower case, digits, articles and contractions."""
    return normalize_words(strip_punctuation(one_line(text), ascii_digits=True))


def score(prediction: str, answers: list[dict[str, Any]] | list[str]) -> float:
    """Official accuracy in 0..1 against (ten) human answers, leave-one-out.

    Only where the stripped answers are not all the same is anything normalised: "Yes" against ten "yes" is wrong.
    Of answer records the official code leaves out all that are *equal* to the one at hand, which without distinct
    answer_ids is more than one.
    """
    if not answers:
        raise UserError("a question has no human answers, so it cannot be scored.")
    records = [dict(a) if isinstance(a, dict) else {"answer": a, "answer_id": i} for i, a in enumerate(answers)]
    texts = [one_line(record.pop("answer")) for record in records]
    prediction = one_line(prediction)
    if len(set(texts)) > 1:
        texts = [normalize(text) for text in texts]
        prediction = normalize(prediction)
    return leave_one_out(prediction, list(zip(texts, records, strict=True)))


def submission_answer(text: str) -> str:
    """What LLaVA and TinyLLaVA upload for an answer: EvalAI's (M4C's) normaliser, not the official scorer's."""
    return normalize_m4c(text)


def submission(answers: dict[str, str], question_ids: list[int]) -> list[dict[str, Any]]:
    """The upload file: one line for each id of the whole test split, with "" where there is no answer."""
    return [
        {"question_id": i, "answer": submission_answer(answers[str(i)]) if str(i) in answers else ""}
        for i in question_ids
    ]


def _test_ids(root: str | Path) -> list[int]:
    """The ids of the whole test split, which the upload of test-dev has too; none where it is not there."""
    path = find(root, FOLDER, *_files("test"))
    if path is None:
        records = _hub_rows(root, "test", None)
    else:
        records = read_jsonl(path) if path.suffix == ".jsonl" else field_of(read_json(path), "questions", path)
    return [record["question_id"] for record in records]


def percent(values: list[float]) -> float:
    """100 x the mean to two decimals; exact halves away from zero, as Python 2 (and so the official scorer) rounds."""
    return float(Decimal(100 * sum(values) / len(values)).quantize(Decimal("0.01"), ROUND_HALF_UP))


def aggregate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The official `accuracy` (overall, perAnswerType, perQuestionType) and `evalQA`, all in percent."""

    def by(name: str) -> dict[str, float]:
        groups: dict[str, list[float]] = {}
        for one in items:
            groups.setdefault(one[name], []).append(one["score"])
        return {group: percent(scores) for group, scores in groups.items()}

    return {
        "overall": percent([one["score"] for one in items]) if items else 0.0,
        "perAnswerType": by("category"),
        "perQuestionType": by("question_type"),
        "evalQA": {one["id"]: percent([one["score"]]) for one in items},
    }


def evaluate(root: str | Path, pairs: list[tuple[Question, dict[str, Any] | None]]) -> dict[str, Any]:
    """Score val2014 answers; for a test split, make the upload file."""
    answered = [(question, record["text"]) for question, record in pairs if record is not None]
    if any(question.answer is None for question, _ in pairs):
        ids = _test_ids(root) or [q.question_id for q, _ in pairs]
        upload = submission({q.id: text for q, text in answered}, ids)
        items = [item(q, text, submission_answer(text), None) for q, text in answered]
        metric = "VQAv2 test: upload to EvalAI challenge 830"
        return result(None, metric, {}, items, files={"vqav2_upload.json": upload})
    items = [
        item(q, text, normalize(text), score(text, q.answer), question_type=q.extra["question_type"])
        for q, text in answered
    ]
    return result(100 * mean(one["score"] for one in items), "VQAv2 val accuracy", aggregate(items), items)
