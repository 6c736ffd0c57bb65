"""MM-Vet: 218 open questions, graded 0..1 by an LLM judge; the published numbers had gpt-4-0613.

    tinyllava eval CHECKPOINT --tasks mmvet --data ROOT      # no judge: the file for the Space whyu/MM-Vet_Evaluator
    tinyllava eval CHECKPOINT --tasks mmvet --data ROOT --judge gpt-4-0613    # with OPENAI_API_KEY, OPENAI_BASE_URL
    tinyllava score mmvet --data ROOT --answers FILE --judge grades.json      # given grades, ours or official

Rules: yuweihao/MM-Vet `mm-vet_evaluator.py` acde843 and TinyLLaVA's `convert_mmvet_for_eval.py`. The judge's few-shot
preamble is not ours to ship: put the official `mm-vet_evaluator.py` into the data folder, and it is read from there.
Deviation: a grade of "nan", which the official code takes, is asked again like any other reply that is no grade.
"""

import math
from collections import Counter
from collections.abc import Sequence
from operator import ne
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Question, item, result, variants
from tinyllava.eval.benchmarks import _hub as hub
from tinyllava.eval.benchmarks._files import find, need, read_json, read_jsonl, remedy
from tinyllava.eval.benchmarks._judge import (
    JUDGE_MAX_TOKENS,
    PREAMBLE_SHA256,
    SOURCE,
    Ask,
    RateLimited,
    given_grades,
    grade_all,
    judge,
    judge_prompt,
    official_preamble,
    parse_grade,
)

__all__ = ["JUDGE_MAX_TOKENS", "PREAMBLE_SHA256", "RateLimited", "judge", "judge_prompt", "parse_grade"]

TITLE = "MM-Vet"
FOLDER = "mm-vet"
SCORER = "yuweihao/MM-Vet acde843"
MAX_NEW_TOKENS = 1024

FILE = "mm-vet.json"
HUB = "data/test-*.parquet"

from_short_name = variants({"5-runs": {"runs": 5}})  # the paper's: five grades of each answer


def questions(root: str | Path) -> list[Question]:
    """The questions of `mm-vet.json` or the Hub's copy, in LLaVA's order if `llava-mm-vet.jsonl` is there."""
    samples, folder = _samples(root)
    llava = find(root, FOLDER, "llava-mm-vet.jsonl")
    order = [(key(q), q["question_id"]) for q in read_jsonl(llava)] if llava else [(name, name) for name in samples]
    found = []
    for name, qid in order:
        if name not in samples:
            raise UserError(f"{llava} asks {name}, which the release beside it lacks.")
        sample = samples[name]
        image = (str(folder / sample["imagename"]),)
        capabilities = sorted(set(sample["capability"]))
        extra = {"capability": capabilities}
        found.append(
            Question(name, qid, sample["question"], image, sample["answer"], "+".join(capabilities), extra=extra)
        )
    return found


def _samples(root: str | Path) -> tuple[dict[str, dict[str, Any]], Path]:
    """The release's samples by name, and the folder of their pictures."""
    path = find(root, FOLDER, FILE)
    if path is None:
        columns = ("question_id", "question", "answer", "capability")
        copies = hub.rows(hub.tables(root, FOLDER, HUB), *columns, name=lambda row: f"{row['question_id']}.png")
        if copies:
            return {
                row["question_id"]: {**row, "imagename": row["image"], "capability": row["capability"].split(",")}
                for row in copies
            }, Path()
    path = need(root, FOLDER, FILE, HUB, hint=remedy("mmvet"))
    return read_json(path), path.parent / "images"


def key(record: dict[str, Any]) -> str:
    """LLaVA counts 0, 1, ... where the release says v1_0, v1_1, ..."""
    name = str(record["question_id"])
    return name if name.startswith("v1_") else f"v1_{name}"


def rounded(value: float, decimals: int) -> float:
    """As numpy rounds (scaled, then half to even), which in the last digit is not always as Python does."""
    return round(value * 10**decimals) / 10**decimals


def aggregate(
    capabilities: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    num_run: int | None = None,
    decimals: int = 1,
) -> dict[str, Any]:
    """100 x the mean score in total, per capability and per exact set of them ("ocr+rec"), averaged over the runs.

    `scores[i]` are sample i's grades, one a run. `std` is the population's, of the runs' totals (`runs`).
    """
    num_run = num_run or min(len(runs) for runs in scores)
    sums: dict[str, dict[str, list[float]]] = {"total": {}, "capability": {}, "integration": {}}
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in sums}
    for names, runs in zip(capabilities, scores, strict=True):
        belongs = [("capability", name) for name in sorted(set(names))]
        belongs += [("total", "total"), ("integration", "+".join(sorted(set(names))))]
        for kind, name in belongs:
            counts[kind][name] += 1
            total = sums[kind].setdefault(name, [0.0] * num_run)
            sums[kind][name] = [sum_ + score for sum_, score in zip(total, runs[:num_run], strict=True)]
    percent = {
        kind: {name: [value / counts[kind][name] * 100 for value in values] for name, values in groups.items()}
        for kind, groups in sums.items()
    }
    average = {
        kind: {name: rounded(sum(values) / num_run, decimals) for name, values in groups.items()}
        for kind, groups in percent.items()
    }
    totals = percent["total"]["total"]
    center = sum(totals) / num_run
    return {
        "total": average["total"]["total"],
        "std": rounded(math.sqrt(sum((value - center) ** 2 for value in totals) / num_run), decimals),
        "runs": [rounded(value, decimals) for value in totals],
        "per_capability": average["capability"],
        "capability_counts": dict(counts["capability"]),
        "per_integration": average["integration"],
        "integration_counts": dict(counts["integration"]),
    }


def evaluate(
    root: str | Path,
    pairs: list[tuple[Question, dict[str, Any] | None]],
    grades: str | Path | None = None,
    ask: Ask | None = None,
    model: str = "gpt-4-0613",
    runs: int = 1,
) -> dict[str, Any]:
    """Aggregate the grades in `grades`, after `ask` has filled it up; with neither, only make the upload file."""
    answered = {question.id: (question, record["text"]) for question, record in pairs if record is not None}
    files = {"mmvet_upload.json": {name: text for name, (_, text) in answered.items()}}
    if grades is None:
        if ask is not None:
            raise UserError("MM-Vet: name the file that keeps the judge's grades.")
        items = [item(question, text, None, None) for question, text in answered.values()]
        return result(None, "MM-Vet: no judge; upload to whyu/MM-Vet_Evaluator", {}, items, files=files)
    path = Path(grades)
    if ask is not None:
        hint = f"It holds the judge's few-shot preamble: get it from {SOURCE}."
        evaluator = need(root, FOLDER, "mm-vet_evaluator.py", hint=hint)
        graded = grade_all(ask, answered, path, model, official_preamble(evaluator), runs)
    else:
        graded = given_grades(path, answered)
    lacking = [name for name in answered if len(graded.get(name, {"score": []})["score"]) < runs]
    if lacking:
        raise UserError(
            f"{path} lacks the grades of {len(lacking)} answers (first: {lacking[0]}). Ask a judge for them."
        )
    items, failed = [], 0
    for name, (question, text) in answered.items():
        given = graded[name]
        failed += sum(map(ne, map(parse_grade, given["content"][:runs]), given["score"][:runs]))
        items.append(item(question, text, given["content"], sum(given["score"][:runs]) / runs))
    names = list(answered)
    every = [answered[name][0].extra["capability"] for name in names]
    exact = aggregate(every, [graded[name]["score"] for name in names], runs, decimals=10)
    metrics = aggregate(every, [graded[name]["score"] for name in names], runs)
    judges = sorted({judge for name in names for judge in graded[name]["model"][:runs]})
    files["mmvet_grades.json"] = graded
    return result(exact["total"], f"MM-Vet, judged by {', '.join(judges)}", metrics, items, failed, files)
