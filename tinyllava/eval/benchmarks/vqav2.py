"""VQAv2: short answers to 214,354 questions on COCO val2014 (scored here), or to test-dev (scored by EvalAI).

Published numbers are on test-dev. For it, `evaluate` writes the upload file for EvalAI challenge 830, and no score.

    tinyllava eval CHECKPOINT --tasks vqav2 --data ROOT
    tinyllava score vqav2 --data ROOT --answers results.json

Rules: GT-Vision-Lab/VQA `vqaEval.py` and `vqa.py`, a013f00 (Python 2); upload: `convert_vqav2_for_submission.py` of
TinyLLaVA 53f12c7.
"""

import functools
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, ClassVar

from tinyllava.errors import UserError
from tinyllava.eval import benchmarks
from tinyllava.eval.benchmarks import (
    SHORT_ANSWER,
    Pair,
    Question,
    Root,
    ScoredItem,
    average,
    build_item,
    build_result,
    drop_missing,
    group_items,
)
from tinyllava.eval.benchmarks._files import get_field, read_json_file, read_jsonl
from tinyllava.eval.benchmarks._layouts import DataFiles
from tinyllava.eval.benchmarks._vqa import (
    join_lines,
    normalize_m4c,
    normalize_words,
    score_leave_one_out,
    strip_punctuation,
)

SPLITS = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}
HUB = {
    "val": "data/validation-*.parquet",
    "test-dev": "data/testdev-*.parquet",
    "test": "data/test-*.parquet",
}
FILES = DataFiles("vqav2", folder="vqav2")


def _list_files(split: str) -> tuple[str, str]:
    """The names of LLaVA's and of the official questions of a split."""
    return f"llava_vqav2_mscoco_{SPLITS[split]}.jsonl", f"v2_OpenEnded_mscoco_{SPLITS[split]}_questions.json"


def _read_questions(root: Root, split: str) -> list[Question]:
    """Read the questions of one split; [] if it does not exist."""
    name = SPLITS[split].replace("test-dev", "test")
    path, folder = FILES.find(root, *_list_files(split)), FILES.find(root, name)
    rows = [] if path and folder else _read_hub(root, split, None if folder else name)
    find_image = FILES.find_images(root, name, rows, parent=path.parent if path else None)
    if path and path.suffix == ".jsonl":
        return [
            Question(str(q["question_id"]), q["question_id"], q["text"], (find_image(q["image"]),))
            for q in read_jsonl(path)
        ]
    gold = {q["question_id"]: q for q in rows}
    if path and split == "val":
        gold = _read_annotations(path.parent / f"v2_mscoco_{SPLITS[split]}_annotations.json")
    return [
        _build_question(q, gold.get(q["question_id"], {}), find_image(_name_image(name, q)))
        for q in (get_field(read_json_file(path), "questions", path) if path else rows)
    ]


def _build_question(q: dict[str, Any], gold: dict[str, Any], image: str) -> Question:
    return Question(
        str(q["question_id"]),
        q["question_id"],
        f"{q['question']}\n{SHORT_ANSWER}",
        (image,),
        gold.get("answers") or None,
        gold.get("answer_type") or "",
        extra={"question_type": gold.get("question_type") or ""},
    )


def _name_image(folder: str, question: dict[str, Any]) -> str:
    """COCO's file name for the image of a question."""
    return f"COCO_{folder}_{question['image_id']:012d}.jpg"


def _read_hub(root: Root, split: str, folder: str | None) -> list[dict[str, Any]]:
    """Read the Hub's rows. Their images get COCO's names; if `folder` is None, no images are read."""
    columns = ("question_id", "image_id", "question", "answers", "answer_type", "question_type")
    name = functools.partial(_name_image, folder) if folder else None
    return FILES.read_rows(root, [HUB[split]], columns, name=name)


def _read_annotations(path: Path) -> dict[int, dict[str, Any]]:
    """Read the right answers by question id. Raises UserError if the file does not exist."""
    if not path.exists():
        raise UserError(f"expected {path}, which has the right answers to the val2014 questions. {FILES.suggest()}")
    return {a["question_id"]: a for a in get_field(read_json_file(path), "annotations", path)}


@functools.lru_cache(maxsize=1 << 16)
def normalize(text: str) -> str:
    """Normalise as the official scorer does: punctuation, then lower case, digits, articles and contractions."""
    return normalize_words(strip_punctuation(join_lines(text), ascii_digits=True))


def score(prediction: str, answers: list[dict[str, Any]] | list[str]) -> float:
    """The official accuracy in 0..1 against (ten) human answers, leave-one-out.

    If all stripped answers are the same, nothing is normalised: "Yes" is wrong if all ten answers are "yes". For each
    answer record, the official code leaves out all *equal* records. Without distinct answer_ids, that can be several.
    """
    if not answers:
        raise UserError("a question has no human answers, so it cannot be scored.")
    records = [dict(a) if isinstance(a, dict) else {"answer": a, "answer_id": i} for i, a in enumerate(answers)]
    texts = [join_lines(record.pop("answer")) for record in records]
    prediction = join_lines(prediction)
    if len(set(texts)) > 1:
        texts = [normalize(text) for text in texts]
        prediction = normalize(prediction)
    return score_leave_one_out(prediction, list(zip(texts, records, strict=True)))


def normalize_submission(text: str) -> str:
    """Normalise an answer for the upload, as LLaVA and TinyLLaVA do: by EvalAI's (M4C's) rules, not the scorer's."""
    return normalize_m4c(text)


def build_submission(answers: dict[str, str], question_ids: list[int]) -> list[dict[str, Any]]:
    """Build the upload file: one entry for each id of the whole test split, with "" if there is no answer."""
    return [
        {"question_id": i, "answer": normalize_submission(answers[str(i)]) if str(i) in answers else ""}
        for i in question_ids
    ]


def _list_test_ids(root: Root) -> list[int]:
    """List the ids of the whole test split, which an upload for test-dev requires; [] if the split does not exist."""
    path = FILES.find(root, *_list_files("test"))
    if path is None:
        records = _read_hub(root, "test", None)
    else:
        records = read_jsonl(path) if path.suffix == ".jsonl" else get_field(read_json_file(path), "questions", path)
    return [record["question_id"] for record in records]


def round_percent(values: list[float]) -> float:
    """100 x the mean, rounded to two decimals as Python 2 and the official scorer do: halves away from zero."""
    return float(Decimal(100 * sum(values) / len(values)).quantize(Decimal("0.01"), ROUND_HALF_UP))


def aggregate(items: list[ScoredItem]) -> dict[str, Any]:
    """Compute the official `accuracy` (overall, perAnswerType, perQuestionType) and `evalQA`, all in percent."""

    def score_groups(name: str) -> dict[str, float]:
        groups = group_items(items, name)
        return {value: round_percent([item["score"] for item in group]) for value, group in groups.items()}

    return {
        "overall": round_percent([item["score"] for item in items]) if items else 0.0,
        "perAnswerType": score_groups("category"),
        "perQuestionType": score_groups("question_type"),
        "evalQA": {item["id"]: round_percent([item["score"]]) for item in items},
    }


@dataclass
class Benchmark(benchmarks.Benchmark):
    """VQAv2 by the official rules. Val is scored here; for the test splits, the upload file is written."""

    title = "VQAv2"
    scorer = "GT-Vision-Lab/VQA a013f00"
    folder = FILES.folder
    variants: ClassVar = {split: {"split": split} for split in SPLITS}

    split: str | None = None  # None: the first of val, test-dev and test that exists

    def questions(self, root: Root) -> list[Question]:
        """The questions of the split.

        Reads LLaVA's `llava_vqav2_mscoco_{test-dev2015,test2015}.jsonl`, or the official
        `v2_OpenEnded_mscoco_*_questions.json` and for val `v2_mscoco_val2014_annotations.json`, or the Hub's tables.
        """
        if self.split is not None and self.split not in SPLITS:
            raise UserError(f"unknown VQAv2 split '{self.split}'. Known: {', '.join(SPLITS)}.")
        splits = [self.split] if self.split else list(SPLITS)
        questions = next((questions for split in splits if (questions := _read_questions(root, split))), [])
        if not questions:
            FILES.require(root, *(name for split in splits for name in (*_list_files(split), HUB[split])))
        return questions

    def parse(self, text: str, question: Question) -> str:
        """The module's `normalize`."""
        return normalize(text)

    def score(self, text: str, question: Question) -> float:
        """The module's `score`."""
        return score(text, question.answer)

    def evaluate(self, root: Root, pairs: list[Pair]) -> dict[str, Any]:
        """Score answers to val2014; for a test split, write the upload file."""
        answered = drop_missing(pairs)
        if any(question.answer is None for question, _ in pairs):
            ids = _list_test_ids(root) or [question.question_id for question, _ in pairs]
            upload = build_submission({question.id: record["text"] for question, record in answered}, ids)
            items = [
                build_item(q, record["text"], normalize_submission(record["text"]), None) for q, record in answered
            ]
            metric = "VQAv2 test: upload to EvalAI challenge 830"
            return build_result(None, metric, {}, items, files={"vqav2_upload.json": upload})
        items = self.score_answered(answered)
        for item, (question, _) in zip(items, answered, strict=True):
            item["question_type"] = question.extra["question_type"]
        accuracy = 100 * average(item["score"] for item in items)
        return build_result(accuracy, "VQAv2 val accuracy", aggregate(items), items)
