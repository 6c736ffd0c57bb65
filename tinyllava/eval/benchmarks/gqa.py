"""GQA testdev-balanced: 12,578 compositional questions on 398 images, exact match.

    tinyllava eval CHECKPOINT --tasks gqa --data ROOT                   # gqa-val: the 132,062 of val-balanced
    tinyllava score gqa-consistency --data ROOT --answers FILE          # FILE also answers unbalanced questions

Rules: GQA `eval.py` 1.2, with the patch that testdev requires (no scene graphs, choices optional), as in Video-LLaVA
1d28d6e. Answers are first converted as in TinyLLaVA's `convert_gqa_for_eval.py`.
"""

import ast
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tinyllava.errors import UserError
from tinyllava.eval import benchmarks
from tinyllava.eval.benchmarks import SHORT_ANSWER, Pair, Question, Root, average, build_result, drop_missing
from tinyllava.eval.benchmarks._files import read_json_file, read_jsonl
from tinyllava.eval.benchmarks._hub import to_records
from tinyllava.eval.benchmarks._layouts import DataFiles

FILES = DataFiles("gqa", folder="gqa")
LLAVA_FILE = "llava_gqa_testdev_balanced.jsonl"


def _list_files(split: str) -> tuple[str, ...]:
    """The possible paths of a split's official questions."""
    name = f"{split}_balanced_questions.json"
    return name, f"questions/{name}", f"data/{name}"


def _name_tables(split: str, what: str) -> str:
    return f"{split}_balanced_{what}/{split}-*.parquet"


def _read_release(root: Root, split: str) -> dict[str, dict[str, Any]]:
    """Read the official questions by id, from their file or the Hub's tables; {} if neither exists."""
    path = FILES.find(root, *_list_files(split))
    if path:
        return read_json_file(path)
    columns = ("id", "imageId", "question", "answer", "types")
    return {
        row["id"]: {**row, "entailed": _parse_list(row["entailed"]), "semantic": to_records(row["semantic"])}
        for row in FILES.read_rows(root, [_name_tables(split, "instructions")], columns)
    }


def _parse_list(text: str | None) -> list[str]:
    """Parse a list that the Hub's tables store as Python text."""
    return ast.literal_eval(text) if text else []


def _find_images(root: Root, split: str) -> Callable[[str], str]:
    """A function that returns the path of an image by its name: in `images/`, or from the Hub's tables of images."""
    tables = [] if FILES.find(root, "images") else [_name_tables(split, "images")]
    return FILES.find_images(root, "images", FILES.read_rows(root, tables, ["id"], name=lambda row: f"{row['id']}.jpg"))


def _build_question(qid: str, gold: dict[str, Any], text: str, image: str) -> Question:
    category = gold["types"]["structural"] if gold else ""
    balanced = gold.get("isBalanced", True)
    return Question(qid, qid, text, (image,), gold.get("answer"), category, required=balanced, extra={"official": gold})


def normalize(text: str) -> str:
    """Normalise to lower case without periods at the end. Spaces, articles and other marks stay."""
    return text.rstrip(".").lower()


def score(prediction: str, answer: str) -> float:
    """1 if the normalised prediction equals the answer exactly, else 0."""
    return float(normalize(prediction) == answer)


def count_steps(question: Mapping[str, Any]) -> int:
    """Count reasoning steps: the operations of the program without final queries (exist, query: name, choose name)."""
    final = ("exist", "query: name", "choose name")
    return sum(not any(f in f"{s['operation']}: {s['argument']}" for f in final) for s in question["semantic"])


def compute_chi_square(
    gold: Mapping[str, Mapping[str, int]], predicted: Mapping[str, Mapping[str, int]]
) -> float | None:
    """The chi-square of predicted and right answers, averaged over the groups by their size; None without groups."""
    weighted = questions = 0.0
    for group, counts in gold.items():
        size = sum(counts.values())
        weighted += size * sum((predicted[group].get(answer, 0) - n) ** 2 / n for answer, n in counts.items())
        questions += size
    return weighted / questions if questions else None


def aggregate(
    questions: Mapping[str, Mapping[str, Any]],
    predictions: Sequence[Mapping[str, str]],
    choices: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    consistency: bool = False,
) -> dict[str, Any]:
    """Compute all official scores in percent. Exception: `distribution`, for which lower is better.

    questions: as in the release. predictions: [{questionId, prediction}], already normalised; of two, the last counts.
    choices: without them, validity and plausibility are 0. consistency: unbalanced questions need predictions too.
    `distribution` is None if no question has a group.
    """
    answers = {p["questionId"]: p["prediction"] for p in predictions}
    missing = [qid for qid, q in questions.items() if qid not in answers and (consistency or q["isBalanced"])]
    if missing:
        raise UserError(f"GQA: {len(missing)} questions have no prediction (first: {', '.join(missing[:3])}).")
    overall: dict[str, list[float]] = defaultdict(list)
    detailed: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for qid, question in questions.items():
        if not question["isBalanced"]:
            continue
        answer, kind = answers[qid], question["types"]["structural"]
        correct = float(answer == question["answer"])
        for name in ("accuracy", "open" if kind == "query" else "binary"):
            overall[name].append(correct)
        detailed["accuracyPerStructuralType"][kind].append(correct)
        detailed["accuracyPerSemanticType"][question["types"]["semantic"]].append(correct)
        detailed["accuracyPerSteps"][str(count_steps(question))].append(correct)
        detailed["accuracyPerLength"][str(len(question["question"].split()))].append(correct)
        for name, among in (("validity", "valid"), ("plausibility", "plausible")):
            overall[name].append(float(bool(choices) and _is_among(answer, choices[qid][among], question)))
        if question["groups"]["global"] is not None:
            gold[question["groups"]["global"]][question["answer"]] += 1
            predicted[question["groups"]["global"]][answer] += 1
        entailed = [entailed_id for entailed_id in question["entailed"] if entailed_id != qid]
        if consistency and correct and entailed:
            if not questions.keys() >= set(entailed):
                raise UserError(
                    f"GQA consistency: question {qid} entails questions that are missing from the file of questions."
                )
            overall["consistency"].append(average(float(answers[i] == questions[i]["answer"]) for i in entailed))
    names = ["binary", "open", "accuracy", *(["consistency"] if consistency else []), "validity", "plausibility"]
    scores: dict[str, Any] = {name: 100 * average(overall[name]) for name in names}
    distance = compute_chi_square(gold, predicted)
    scores["distribution"] = None if distance is None else distance / 100
    for name, types in detailed.items():
        scores[name] = {kind: {"score": 100 * average(values), "n": len(values)} for kind, values in types.items()}
    return scores


def _is_among(answer: str, group: Sequence[str], question: Mapping[str, Any]) -> bool:
    """Whether the answer is among the choices `group` of a question."""
    # For "...Common" questions, the official code uses the names of the attributes as the choices.
    return answer in (("color", "material", "shape") if "Common" in question["types"]["detailed"] else group)


@dataclass
class Benchmark(benchmarks.Benchmark):
    """The balanced questions of testdev or val."""

    title = "GQA"
    scorer = "GQA eval.py 1.2"
    folder = FILES.folder
    variants: ClassVar = {"val": {"split": "val"}, "consistency": {"consistency": True}}

    split: str = "testdev"
    consistency: bool = False  # also score consistency, which requires answers to unbalanced questions

    def questions(self, root: Root) -> list[Question]:
        """The questions of LLaVA's `llava_gqa_testdev_balanced.jsonl`, or of the release, or of the Hub's tables."""
        llava = FILES.find(root, LLAVA_FILE) if self.split == "testdev" else None
        if not llava:
            return self.references(root)
        gold, find_image = _read_release(root, self.split), _find_images(root, self.split)
        return [
            _build_question(q["question_id"], gold.get(q["question_id"], {}), q["text"], find_image(q["image"]))
            for q in read_jsonl(llava)
        ]

    def references(self, root: Root) -> list[Question]:
        """The official questions with their right answers. Only balanced questions must be answered."""
        release, find_image = _read_release(root, self.split), _find_images(root, self.split)
        if not release:
            FILES.require(root, *_list_files(self.split), _name_tables(self.split, "instructions"))
        return [
            _build_question(qid, q, f"{q['question']}\n{SHORT_ANSWER}", find_image(f"{q['imageId']}.jpg"))
            for qid, q in release.items()
        ]

    def parse(self, text: str, question: Question) -> str:
        """The module's `normalize`."""
        return normalize(text)

    def score(self, text: str, question: Question) -> float:
        """The module's `score`."""
        return score(text, question.answer)

    def evaluate(self, root: Root, pairs: list[Pair]) -> dict[str, Any]:
        """The official scores of the answered questions. Choices are read if their official file exists."""
        answered = drop_missing(pairs)
        asked = self.references(root) if self.consistency else [question for question, _ in answered]
        official = {question.id: question.extra["official"] for question in asked}
        names = (f"{self.split}_balanced_choices.json", f"{self.split}_choices.json")
        path = FILES.find(root, *names, *(f"data/{name}" for name in names))
        predictions = [{"questionId": q.id, "prediction": normalize(record["text"])} for q, record in answered]
        scores = aggregate(official, predictions, read_json_file(path) if path else None, self.consistency)
        # Answers to unbalanced questions count for consistency only.
        items = self.score_answered([(question, record) for question, record in answered if question.required])
        return build_result(scores["accuracy"], f"GQA {self.split}-balanced accuracy", scores, items)
