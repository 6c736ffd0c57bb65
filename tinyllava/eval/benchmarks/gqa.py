"""GQA testdev-balanced: 12,578 compositional questions on 398 pictures, exact match.

    tinyllava eval CHECKPOINT --tasks gqa --data ROOT                   # gqa-val: the 132,062 of val-balanced
    tinyllava score gqa-consistency --data ROOT --answers FILE          # with the answers to unbalanced questions too

Rules: GQA `eval.py` 1.2 with the patch that testdev needs (no scene graphs, choices optional), as vendored in
Video-LLaVA 1d28d6e; answers are first converted as in TinyLLaVA's `convert_gqa_for_eval.py`.
"""

import ast
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import SHORT_ANSWER, Question, item, mean, result, variants
from tinyllava.eval.benchmarks import _hub as hub
from tinyllava.eval.benchmarks._files import find, need, read_json, read_jsonl, remedy

TITLE = "GQA"
FOLDER = "gqa"
SCORER = "GQA eval.py 1.2"
MAX_NEW_TOKENS = 128

LLAVA_FILE = "llava_gqa_testdev_balanced.jsonl"
from_short_name = variants({"val": {"split": "val"}, "consistency": {"consistency": True}})


def files(split: str) -> tuple[str, ...]:
    """Where the official questions of a split may lie."""
    name = f"{split}_balanced_questions.json"
    return name, f"questions/{name}", f"data/{name}"


def questions(root: str | Path, split: str = "testdev") -> list[Question]:
    """The questions of LLaVA's `llava_gqa_testdev_balanced.jsonl`, else of the release or the Hub's copy of it."""
    llava = find(root, FOLDER, LLAVA_FILE) if split == "testdev" else None
    if not llava:
        return references(root, split)
    gold, picture = _release(root, split), _pictures(root, split)
    return [
        _question(q["question_id"], gold.get(q["question_id"], {}), q["text"], picture(q["image"]))
        for q in read_jsonl(llava)
    ]


def references(root: str | Path, split: str = "testdev") -> list[Question]:
    """The official questions with their answers. Only balanced ones need an answer."""
    release, picture = _release(root, split), _pictures(root, split)
    if not release:
        need(root, FOLDER, *files(split), _hub_files(split, "instructions"), hint=remedy("gqa"))
    return [
        _question(qid, q, f"{q['question']}\n{SHORT_ANSWER}", picture(f"{q['imageId']}.jpg"))
        for qid, q in release.items()
    ]


def _hub_files(split: str, what: str) -> str:
    return f"{split}_balanced_{what}/{split}-*.parquet"


def _release(root: str | Path, split: str) -> dict[str, dict[str, Any]]:
    """The official questions by id, from their file or the Hub's copy; none where neither is."""
    path = find(root, FOLDER, *files(split))
    if path:
        return read_json(path)
    copies = hub.rows(
        hub.tables(root, FOLDER, _hub_files(split, "instructions")), "id", "imageId", "question", "answer", "types"
    )
    return {
        row["id"]: {**row, "entailed": _listed(row["entailed"]), "semantic": hub.records(row["semantic"])}
        for row in copies
    }


def _listed(text: str | None) -> list[str]:
    """The Hub's copy keeps this list as the text of one."""
    return ast.literal_eval(text) if text else []


def _pictures(root: str | Path, split: str) -> Callable[[str], str]:
    """Where the picture of that name lies: in `images/`, or in what the Hub's copy holds."""
    folder = find(root, FOLDER, "images")
    files = [] if folder else hub.tables(root, FOLDER, _hub_files(split, "images"))
    copies = hub.pictures(hub.rows(files, "id", name=lambda row: f"{row['id']}.jpg"))
    folder = folder or Path(root) / FOLDER / "images"
    return lambda name: copies.get(name, str(folder / name))


def _question(qid: str, gold: dict[str, Any], text: str, image: str) -> Question:
    category = gold["types"]["structural"] if gold else ""
    balanced = gold.get("isBalanced", True)
    return Question(qid, qid, text, (image,), gold.get("answer"), category, required=balanced, extra={"official": gold})


def normalize(text: str) -> str:
    """Lower case without the periods at the end, and nothing else: spaces, articles and other marks stay."""
    return text.rstrip(".").lower()


def score(prediction: str, answer: str) -> float:
    """1 if the converted prediction is the answer to the letter, else 0."""
    return float(normalize(prediction) == answer)


def steps(question: Mapping[str, Any]) -> int:
    """Reasoning steps: operations of the program but for the final query (exist, query: name, choose name)."""
    final = ("exist", "query: name", "choose name")
    return sum(not any(f in f"{s['operation']}: {s['argument']}" for f in final) for s in question["semantic"])


def chi_square(gold: Mapping[str, Mapping[str, int]], predicted: Mapping[str, Mapping[str, int]]) -> float | None:
    """Chi-square of predicted against gold answers, averaged over the groups by their size; None of no groups."""
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
    """All official scores, in percent, but `distribution`: lower is better, and None where no question has a group.

    `questions` as in the release, `predictions` [{questionId, prediction}] already normalised (of two the last wins);
    without `choices` validity and plausibility are 0; for `consistency` unbalanced questions need predictions too.
    """
    answers = {p["questionId"]: p["prediction"] for p in predictions}
    lacking = [qid for qid, q in questions.items() if qid not in answers and (consistency or q["isBalanced"])]
    if lacking:
        raise UserError(f"GQA: {len(lacking)} questions have no prediction (first: {', '.join(lacking[:3])}).")
    single: dict[str, list[float]] = defaultdict(list)
    detailed: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for qid, question in questions.items():
        if not question["isBalanced"]:
            continue
        answer, kind = answers[qid], question["types"]["structural"]
        correct = float(answer == question["answer"])
        for name in ("accuracy", "open" if kind == "query" else "binary"):
            single[name].append(correct)
        detailed["accuracyPerStructuralType"][kind].append(correct)
        detailed["accuracyPerSemanticType"][question["types"]["semantic"]].append(correct)
        detailed["accuracyPerSteps"][str(steps(question))].append(correct)
        detailed["accuracyPerLength"][str(len(question["question"].split()))].append(correct)
        for name, among in (("validity", "valid"), ("plausibility", "plausible")):
            single[name].append(float(bool(choices) and _belongs(answer, choices[qid][among], question)))
        if question["groups"]["global"] is not None:
            gold[question["groups"]["global"]][question["answer"]] += 1
            predicted[question["groups"]["global"]][answer] += 1
        entailed = [other for other in question["entailed"] if other != qid]
        if consistency and correct and entailed:
            if not questions.keys() >= set(entailed):
                raise UserError(f"GQA consistency: question {qid} entails questions that the questions file lacks.")
            single["consistency"].append(mean(float(answers[o] == questions[o]["answer"]) for o in entailed))
    names = ["binary", "open", "accuracy", *(["consistency"] if consistency else []), "validity", "plausibility"]
    scores: dict[str, Any] = {name: 100 * mean(single[name]) for name in names}
    distance = chi_square(gold, predicted)
    scores["distribution"] = None if distance is None else distance / 100
    for name, types in detailed.items():
        scores[name] = {kind: {"score": 100 * mean(values), "n": len(values)} for kind, values in types.items()}
    return scores


def _belongs(answer: str, group: Sequence[str], question: Mapping[str, Any]) -> bool:
    # The official code replaces the choices of "...Common" questions by the names of the attributes.
    return answer in (("color", "material", "shape") if "Common" in question["types"]["detailed"] else group)


def evaluate(
    root: str | Path,
    pairs: list[tuple[Question, dict[str, Any] | None]],
    consistency: bool = False,
    split: str = "testdev",
) -> dict[str, Any]:
    """The official scores of the answered questions; choices are read if the official file is there."""
    answered = [(question, record["text"]) for question, record in pairs if record is not None]
    everything = references(root, split) if consistency else [question for question, _ in answered]
    official = {question.id: question.extra["official"] for question in everything}
    names = (f"{split}_balanced_choices.json", f"{split}_choices.json")
    path = find(root, FOLDER, *names, *(f"data/{name}" for name in names))
    predictions = [{"questionId": question.id, "prediction": normalize(text)} for question, text in answered]
    scores = aggregate(official, predictions, read_json(path) if path else None, consistency)
    items = [item(q, text, normalize(text), score(text, q.answer)) for q, text in answered if q.required]
    return result(scores["accuracy"], f"GQA {split}-balanced accuracy", scores, items)
