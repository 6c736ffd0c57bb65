"""POPE: yes/no questions on objects that are or are not in 500 COCO pictures; three ways to choose the absent ones.

    tinyllava eval CHECKPOINT --tasks pope --data ROOT

Published numbers are F1, averaged here over random, popular and adversarial. LLaVA's files pin POPE's commit e3e3926,
with 2,910 random questions; later releases have 3,000 (each category's size is in the results).

Rules: RUCAIBox/POPE `evaluate.py` 3df3ba1, as in LLaVA; TinyLLaVA adds 1e-6 to the denominators: pope-eps.
Deviation: the official scripts match answers and labels by their order, here by id; pope-in-order does as they do.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import SHORT_ANSWER, Question, item, mean, result, variants
from tinyllava.eval.benchmarks import _hub as hub
from tinyllava.eval.benchmarks._files import find, need, read_jsonl, remedy

TITLE = "POPE"
FOLDER = "pope"
SCORER = "RUCAIBox/POPE evaluate.py 3df3ba1"
MAX_NEW_TOKENS = 128

CATEGORIES = ("adversarial", "popular", "random")
LLAVA_FILE = "llava_pope_test.jsonl"
HUB = ("data/test-*.parquet", "Full/*-*.parquet")

from_short_name = variants({"eps": {"eps": 1e-6}, "in-order": {"in_order": True}})


def questions(root: str | Path) -> list[Question]:
    """The release's questions, in the order and with the ids of LLaVA's `llava_pope_test.jsonl` if that is there.

    The release is `coco/coco_pope_{category}.json` with the pictures in `val2014/`, or the Hub's parquet files.
    """
    labels = _labels(root)
    llava = find(root, FOLDER, LLAVA_FILE)
    if not llava:
        return [
            _question(f"{category}/{q['question_id']}", f"{q['text']}\n{SHORT_ANSWER}", category, q)
            for category in CATEGORIES
            for q in labels[category]
        ]
    asked = read_jsonl(llava)
    counts = Counter(q["category"] for q in asked)
    for category, lines in labels.items():
        if counts[category] != len(lines):
            raise UserError(
                f"{llava.name} has {counts[category]} {category} questions and the release here {len(lines)} labels: "
                "they belong to different releases of POPE. `tinyllava data prepare pope` gets the labels of LLaVA's."
            )
    iterators = {category: iter(lines) for category, lines in labels.items()}
    found = []
    for q in asked:
        label = next(iterators[q["category"]])
        if label["image"] != q["image"]:
            raise UserError(
                f"question {q['question_id']} of {llava.name} is about {q['image']}, and its {q['category']} label "
                f"about {label['image']}: they belong to different releases of POPE."
            )
        found.append(_question(q["question_id"], q["text"], q["category"], label))
    return found


def _labels(root: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The release's questions by category, each with the `path` of its picture."""
    names = {category: (f"coco/coco_pope_{category}.json", f"coco_pope_{category}.json") for category in CATEGORIES}
    folder, is_official = find(root, FOLDER, "val2014"), any(find(root, FOLDER, *one) for one in names.values())
    copies = [] if folder and is_official else _hub_rows(root)
    if copies and not is_official:
        return {category: [q for q in copies if q["category"] == category] for category in CATEGORIES}
    files = {category: need(root, FOLDER, *one, *HUB, hint=remedy("pope")) for category, one in names.items()}
    folder = folder or files["random"].parent.parent / "val2014"
    pictures = {q["image"]: q["path"] for q in copies}
    return {
        category: [{**q, "path": pictures.get(q["image"], str(folder / q["image"]))} for q in read_jsonl(file)]
        for category, file in files.items()
    }


def _hub_rows(root: str | Path) -> list[dict[str, Any]]:
    """The Hub's rows in the release's form."""
    columns = ("question_id", "question", "answer", "image_source", "category")
    found = hub.rows(hub.tables(root, FOLDER, *HUB), *columns, name=lambda row: f"{Path(row['image_source']).stem}.jpg")
    return [
        {
            "question_id": int(row["question_id"]),
            "image": f"{Path(row['image_source']).stem}.jpg",
            "text": row["question"],
            "label": row["answer"].strip().lower(),
            "category": row["category"],
            "path": row["image"],
        }
        for row in found
    ]


def _question(qid: str | int, text: str, category: str, label: dict[str, Any]) -> Question:
    return Question(f"{category}/{label['question_id']}", qid, text, (label["path"],), label["label"], category)


def choose_from(question: Question) -> tuple[str, ...]:
    """The two answers."""
    return ("Yes", "No")


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


def tally(item: dict[str, Any]) -> dict[str, float]:
    """What F1 is made of: of each category the right and the wrong yes, and the yes that were missed."""
    said, is_yes = item["parsed"] == "yes", item["gold"] != "no"
    outcome = "TP" if said and is_yes else "FP" if said else "FN" if is_yes else "TN"
    return {f"{item['category']} {outcome}": 1}


def headline(sums: dict[str, float]) -> float:
    """100 x the mean of the categories' F1."""
    scores = []
    for category in sorted({name.rpartition(" ")[0] for name in sums}):
        tp, fp, fn = (sums.get(f"{category} {outcome}", 0) for outcome in ("TP", "FP", "FN"))
        scores.append(_ratio(2 * tp, 2 * tp + fp + fn))
    return 100 * mean(scores)


def by_order(
    pairs: list[tuple[Question, dict[str, Any] | None]],
) -> list[tuple[Question, dict[str, Any] | None]]:
    """Pairs as the official scripts make them: a category's k-th answer in the file with its k-th label."""
    given: dict[str, list[dict[str, Any]]] = {category: [] for category in CATEGORIES}
    for question, record in pairs:
        if record is not None:
            given[question.category].append(record)
    ordered = {name: iter(sorted(records, key=lambda record: record["line"])) for name, records in given.items()}
    return [(question, next(ordered[question.category], None)) for question, _ in pairs]


def evaluate(
    root: str | Path,
    pairs: list[tuple[Question, dict[str, Any] | None]],
    eps: float = 0.0,
    in_order: bool = False,
) -> dict[str, Any]:
    """Each category's scores and their means over the categories."""
    items = []
    for question, record in by_order(pairs) if in_order else pairs:
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
