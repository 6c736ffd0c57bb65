"""POPE: yes/no questions whether an object is in a COCO image (500 images; three ways to choose absent objects).

    tinyllava eval CHECKPOINT --tasks pope --data ROOT

Published numbers are F1, averaged here over random, popular and adversarial. LLaVA's files belong to POPE's commit
e3e3926, which has 2,910 random questions. Later releases have 3,000; results contain each category's size.

Rules: RUCAIBox/POPE `evaluate.py` 3df3ba1, as in LLaVA. TinyLLaVA adds 1e-6 to the denominators: pope-eps does this.
Deviation: the official scripts match answers and labels by their order; here they are matched by id. pope-in-order
matches by order.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tinyllava.errors import UserError
from tinyllava.eval import benchmarks
from tinyllava.eval.benchmarks import (
    SHORT_ANSWER,
    Answer,
    OfficialAnswers,
    Pair,
    Question,
    Root,
    ScoredItem,
    Sums,
    average,
    build_result,
    drop_missing,
    group_items,
    to_answer_fields,
)
from tinyllava.eval.benchmarks._files import read_jsonl
from tinyllava.eval.benchmarks._layouts import DataFiles
from tinyllava.files import parse_json

CATEGORIES = ("adversarial", "popular", "random")
LLAVA_FILE = "llava_pope_test.jsonl"
HUB = ("data/test-*.parquet", "Full/*-*.parquet")
FILES = DataFiles("pope", folder="pope")


def _match_llava(llava: Path, labels: dict[str, list[dict[str, Any]]]) -> list[Question]:
    """Read LLaVA's questions and give them their labels: the k-th question of a category has its k-th label."""
    records = read_jsonl(llava)
    counts = Counter(q["category"] for q in records)
    for category, lines in labels.items():
        if counts[category] != len(lines):
            raise UserError(
                f"{llava.name} has {counts[category]} {category} questions, but the release has {len(lines)} labels: "
                "they belong to different releases of POPE."
                " `tinyllava data prepare pope` downloads the labels for LLaVA's questions."
            )
    iterators = {category: iter(lines) for category, lines in labels.items()}
    questions = []
    for q in records:
        label = next(iterators[q["category"]])
        if label["image"] != q["image"]:
            raise UserError(
                f"question {q['question_id']} of {llava.name} is about {q['image']}, but its {q['category']} label "
                f"is about {label['image']}: they belong to different releases of POPE."
            )
        questions.append(_build_question(q["question_id"], q["text"], q["category"], label))
    return questions


def _read_labels(root: Root) -> dict[str, list[dict[str, Any]]]:
    """Read the release's questions by category, each with the `path` of its image."""
    names = {category: (f"coco/coco_pope_{category}.json", f"coco_pope_{category}.json") for category in CATEGORIES}
    is_official = any(FILES.find(root, *paths) for paths in names.values())
    rows = [] if is_official and FILES.find(root, "val2014") else _read_hub_rows(root)
    if rows and not is_official:
        return {category: [_to_label(row) for row in rows if row["category"] == category] for category in CATEGORIES}
    files = {category: FILES.require(root, *paths, *HUB) for category, paths in names.items()}
    find_image = FILES.find_images(root, "val2014", rows, parent=files["random"].parent.parent)
    return {
        category: [{**q, "path": find_image(q["image"])} for q in read_jsonl(file)] for category, file in files.items()
    }


def _read_hub_rows(root: Root) -> list[dict[str, Any]]:
    columns = ("question_id", "question", "answer", "image_source", "category")
    return FILES.read_rows(root, HUB, columns, name=_name_image)


def _name_image(row: dict[str, Any]) -> str:
    """COCO's file name for a row's image."""
    return f"{Path(row['image_source']).stem}.jpg"


def _to_label(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row of the Hub's tables to the form of the release."""
    return {
        "question_id": int(row["question_id"]),
        "image": _name_image(row),
        "text": row["question"],
        "label": row["answer"].strip().lower(),
        "category": row["category"],
        "path": row["image"],
    }


def _build_question(qid: str | int, text: str, category: str, label: dict[str, Any]) -> Question:
    return Question(f"{category}/{label['question_id']}", qid, text, (label["path"],), label["label"], category)


def _has_official_form(file: Path) -> bool:
    """Whether the first line of a file has POPE's own form, which has no ids."""
    try:
        first = parse_json(file.read_bytes().split(b"\n", 1)[0])
    except ValueError:
        return False
    return isinstance(first, dict) and {"question", "answer"} <= set(first) and "question_id" not in first


def _find_category(path: Path, records: list[dict[str, Any]], questions: list[Question]) -> list[Question]:
    """The questions of the category that a file in the official form answers, in its order.

    Raises UserError if the questions in the file are not those of one category.
    """
    asked = [str(record["question"]).strip().lower() for record in records]
    groups = {name: [q for q in questions if q.category == name] for name in CATEGORIES}
    same = [name for name, group in groups.items() if asked == [q.text.split("\n")[0].strip().lower() for q in group]]
    named = [name for name in same if name in path.stem]
    if len(named or same) != 1:
        sizes = ", ".join(f"{name} {len(group)}" for name, group in groups.items())
        raise UserError(
            f"{path} has {len(records)} answers in POPE's own form, and their questions are not those of one category"
            f" ({sizes}) in the order of the release. Give one file for each category."
        )
    return groups[(named or same)[0]]


def parse(text: str) -> str:
    """Return "no" if a word of the first sentence is No, no or not, else "yes". So "", "NO" and "Nope" are "yes".

    The sentence ends at the first period. Commas are removed, and words are separated by single spaces.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def aggregate(labels: Sequence[str], answers: Sequence[str], eps: float = 0.0) -> dict[str, Any]:
    """Compute counts, accuracy, precision, recall, f1_score and yes_ratio of one category. Answers may be raw text.

    Labels and answers are paired by their order, and the rest of the longer list is ignored. Any label except "no"
    means yes. 0/0 is 0 here; the official script fails. `eps` is added to the denominators (1e-6 in TinyLLaVA).
    """
    if not answers:
        raise UserError("POPE: no answers to score.")
    parsed = [parse(answer) for answer in answers]
    pairs = Counter((answer == "yes", label != "no") for answer, label in zip(parsed, labels, strict=False))
    tp, fp = pairs[True, True], pairs[True, False]
    tn, fn = pairs[False, False], pairs[False, True]
    precision = _divide(tp, tp + fp + eps)
    recall = _divide(tp, tp + fn + eps)
    return {
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "accuracy": _divide(tp + tn, tp + tn + fp + fn),
        "precision": precision,
        "recall": recall,
        "f1_score": _divide(2 * precision * recall, precision + recall + eps),
        "yes_ratio": parsed.count("yes") / len(parsed),
    }


def _divide(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def aggregate_categories(items: Iterable[ScoredItem], eps: float = 0.0) -> dict[str, dict[str, Any]]:
    """Compute `aggregate` of each category, and its number of `samples`."""
    return {
        category: {"samples": len(group)} | aggregate([o["gold"] for o in group], [o["parsed"] for o in group], eps)
        for category, group in sorted(group_items(items, "category").items())
    }


def pair_by_order(pairs: list[Pair]) -> list[Pair]:
    """Pair a category's k-th answer in the file with its k-th label, as the official scripts do."""
    records: dict[str, list[Answer]] = {category: [] for category in CATEGORIES}
    for question, record in drop_missing(pairs):
        records[question.category].append(record)
    ordered = {name: iter(sorted(answers, key=lambda record: record["line"])) for name, answers in records.items()}
    return [(question, next(ordered[question.category], None)) for question, _ in pairs]


@dataclass
class Benchmark(benchmarks.Benchmark):
    """POPE by the release's rules, or by those of other scripts."""

    title = "POPE"
    scorer = "RUCAIBox/POPE evaluate.py 3df3ba1"
    folder = FILES.folder
    variants: ClassVar = {"eps": {"eps": 1e-6}, "in-order": {"in_order": True}}
    has_options = True
    is_mean = False

    eps: float = 0.0  # what is added to the denominators
    in_order: bool = False  # pair answers and labels by their order, not by id

    def questions(self, root: Root) -> list[Question]:
        """The release's questions. If LLaVA's `llava_pope_test.jsonl` exists, they have its order, ids and prompts.

        The release is `coco/coco_pope_{category}.json` with the images in `val2014/`, or the Hub's tables.
        """
        labels = _read_labels(root)
        llava = FILES.find(root, LLAVA_FILE)
        if llava:
            return _match_llava(llava, labels)
        return [
            _build_question(f"{category}/{q['question_id']}", f"{q['text']}\n{SHORT_ANSWER}", category, q)
            for category in CATEGORIES
            for q in labels[category]
        ]

    def read_official(self, path: Path, questions: list[Question]) -> OfficialAnswers | None:
        """POPE's own form: lines {"question", "answer"}, one category a file; or a folder with such files."""
        files = sorted(path.glob("*.json*")) if path.is_dir() else [path]
        records, answered = [], []
        for file in files:
            if not _has_official_form(file):
                return None
            lines = read_jsonl(file)
            asked = _find_category(file, lines, questions)
            records += [{**raw, **to_answer_fields(q)} for raw, q in zip(lines, asked, strict=True)]
            answered += asked
        return OfficialAnswers(records, answered) if files else None

    def choose_from(self, question: Question) -> tuple[str, ...]:
        """Yes and No."""
        return ("Yes", "No")

    def parse(self, text: str, question: Question) -> str:
        """Yes or no, by the module's `parse`."""
        return parse(text)

    def score(self, text: str, question: Question) -> float:
        """1 if the answer is right. Any label except "no" means yes."""
        return float(parse(text) == ("no" if question.answer == "no" else "yes"))

    def evaluate(self, root: Root, pairs: list[Pair]) -> dict[str, Any]:
        """Each category's scores and their means over the categories; the score is the mean F1."""
        items = self.score_answered(pair_by_order(pairs) if self.in_order else pairs)
        categories = aggregate_categories(items, self.eps)
        metrics: dict[str, Any] = {"per_category": categories}
        for name in ("f1_score", "accuracy", "precision", "recall", "yes_ratio"):
            metrics[f"mean_{name}"] = average(scores[name] for scores in categories.values())
        present = "mean of the categories" if len(categories) == len(CATEGORIES) else f"{', '.join(categories)} only"
        return build_result(100 * metrics["mean_f1_score"], f"POPE F1, {present}", metrics, items)

    def tally(self, item: ScoredItem) -> Sums:
        """Count the TP, FP, FN and TN of each category, from which F1 is computed."""
        answers_yes, is_yes = item["parsed"] == "yes", item["gold"] != "no"
        outcome = "TP" if answers_yes and is_yes else "FP" if answers_yes else "FN" if is_yes else "TN"
        return {f"{item['category']} {outcome}": 1}

    def headline(self, sums: Sums) -> float:
        """100 x the mean of the categories' F1."""
        scores = []
        for category in sorted({name.rpartition(" ")[0] for name in sums}):
            tp, fp, fn = (sums.get(f"{category} {outcome}", 0) for outcome in ("TP", "FP", "FN"))
            scores.append(_divide(2 * tp, 2 * tp + fp + fn))
        return 100 * average(scores)
