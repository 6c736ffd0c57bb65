"""POPE: yes/no questions on objects that are or are not in 500 COCO pictures; three ways to choose the absent ones.

    tinyllava eval CHECKPOINT --tasks pope --data ROOT

Published numbers are F1, averaged here over random, popular and adversarial. LLaVA's files pin POPE's commit e3e3926,
with 2,910 random questions; later releases have 3,000 (each category's size is in the results).

Rules: RUCAIBox/POPE `evaluate.py` 3df3ba1; the same in LLaVA and TinyLLaVA, whose `eps=1e-6` is the option `eps`.
Deviation: the official scripts match labels by order, here answers are matched by id.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import SHORT_ANSWER, Question, item, mean, result
from tinyllava.eval.benchmarks._files import find, need, read_jsonl

TITLE = "POPE"
FOLDER = "pope"
SCORER = "RUCAIBox/POPE evaluate.py 3df3ba1"
MAX_NEW_TOKENS = 128

CATEGORIES = ("adversarial", "popular", "random")
LLAVA_FILE = "llava_pope_test.jsonl"


def questions(root: str | Path) -> list[Question]:
    """LLaVA's `llava_pope_test.jsonl` with the labels of `coco/coco_pope_{category}.json`, or the latter alone."""
    llava = find(root, FOLDER, LLAVA_FILE)
    labels = {}
    for category in CATEGORIES:
        name = f"coco_pope_{category}.json"
        labels[category] = need(
            root, FOLDER, f"coco/{name}", name, hint="It is in output/coco of github.com/RUCAIBox/POPE."
        )
    images = find(root, FOLDER, "val2014") or (llava or labels["random"].parent).parent / "val2014"
    official = {category: read_jsonl(path) for category, path in labels.items()}
    if not llava:
        return [
            _question(f"{category}/{q['question_id']}", q, f"{q['text']}\n{SHORT_ANSWER}", category, images, q["label"])
            for category in CATEGORIES
            for q in official[category]
        ]
    asked = read_jsonl(llava)
    counts = Counter(q["category"] for q in asked)
    for category, lines in official.items():
        if counts[category] != len(lines):
            raise UserError(
                f"{llava.name} has {counts[category]} {category} questions and {labels[category].name} {len(lines)} "
                "labels: they belong to different releases of POPE. LLaVA's goes with commit e3e3926 of RUCAIBox/POPE."
            )
    iterators = {category: iter(lines) for category, lines in official.items()}
    found = []
    for q in asked:
        label = next(iterators[q["category"]])
        if label["image"] != q["image"]:
            raise UserError(
                f"question {q['question_id']} of {llava.name} is about {q['image']}, and its label in "
                f"{labels[q['category']].name} about {label['image']}: they belong to different releases of POPE."
            )
        found.append(_question(q["question_id"], q, q["text"], q["category"], images, label["label"]))
    return found


def _question(qid: str | int, q: dict[str, Any], text: str, category: str, images: Path, label: str) -> Question:
    return Question(str(qid), qid, text, (str(images / q["image"]),), label, category)


def parse(text: str) -> str:
    """ "no" if one of the words of the first sentence is No, no or not, else "yes": also for "", "NO" and "Nope".

    The sentence ends at the first period, commas are dropped, and words are what lies between single spaces.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def aggregate(labels: Sequence[str], answers: Sequence[str], eps: float = 0.0) -> dict[str, Any]:
    """Counts, accuracy, precision, recall, f1_score and yes_ratio of one category; answers may be raw text.

    Labels and answers are paired by order as far as both go; any label but "no" means yes. 0/0 is 0 where the official
    script divides by zero. `eps` is what TinyLLaVA adds to the denominators (1e-6).
    """
    if not answers:
        raise UserError("POPE: no answers to score.")
    said = [parse(answer) for answer in answers]
    pairs = Counter((answer == "yes", label != "no") for answer, label in zip(said, labels, strict=False))
    tp, fp, tn, fn = (pairs[key] for key in ((True, True), (True, False), (False, False), (False, True)))
    precision = _ratio(tp, tp + fp + eps)
    recall = _ratio(tp, tp + fn + eps)
    return {
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "accuracy": _ratio(tp + tn, tp + tn + fp + fn),
        "precision": precision,
        "recall": recall,
        "f1_score": _ratio(2 * precision * recall, precision + recall + eps),
        "yes_ratio": said.count("yes") / len(said),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def per_category(items: Iterable[dict[str, Any]], eps: float = 0.0) -> dict[str, dict[str, Any]]:
    """`aggregate` of each category, with its number of `samples`."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in items:
        groups.setdefault(one["category"], []).append(one)
    return {
        category: {"samples": len(group)} | aggregate([o["gold"] for o in group], [o["parsed"] for o in group], eps)
        for category, group in sorted(groups.items())
    }


def headline(items: Iterable[dict[str, Any]]) -> float:
    """100 x the mean of the categories' F1."""
    return 100 * mean(scores["f1_score"] for scores in per_category(items).values())


def evaluate(root: str | Path, pairs: list[tuple[Question, dict[str, Any] | None]], eps: float = 0.0) -> dict[str, Any]:
    """Each category's scores and their means over the categories."""
    items = []
    for question, record in pairs:
        if record is not None:
            parsed = parse(record["text"])
            items.append(
                item(question, record["text"], parsed, float(parsed == ("no" if question.answer == "no" else "yes")))
            )
    categories = per_category(items, eps)
    metrics: dict[str, Any] = {"per_category": categories}
    for name in ("f1_score", "accuracy", "precision", "recall", "yes_ratio"):
        metrics[f"mean_{name}"] = mean(scores[name] for scores in categories.values())
    return result(100 * metrics["mean_f1_score"], "POPE F1, mean of the categories", metrics, items)
