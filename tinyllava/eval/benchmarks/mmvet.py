"""MM-Vet: 218 open questions, graded 0..1 by an LLM judge; for the published numbers, it was gpt-4-0613.

    tinyllava eval CHECKPOINT --tasks mmvet --data ROOT      # writes the file for the Space whyu/MM-Vet_Evaluator
    tinyllava eval CHECKPOINT --tasks mmvet --data ROOT --judge gpt-4-0613    # with OPENAI_API_KEY, OPENAI_BASE_URL
    tinyllava score mmvet --data ROOT --answers FILE --judge grades.json      # existing grades, ours or official

Rules: yuweihao/MM-Vet `mm-vet_evaluator.py` acde843 and TinyLLaVA's `convert_mmvet_for_eval.py`. The judge's few-shot
preamble is third-party text and is not included here: it is read from the official `mm-vet_evaluator.py`, which must be
in the data folder. Deviation: the official code accepts the grade "nan"; here the judge is asked again.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import ne
from pathlib import Path
from typing import Any, ClassVar

from tinyllava.errors import UserError
from tinyllava.eval import benchmarks
from tinyllava.eval.benchmarks import Answer, Pair, Question, Root, build_item, build_result, drop_missing
from tinyllava.eval.benchmarks._files import read_json_file, read_jsonl
from tinyllava.eval.benchmarks._judge import SOURCE, Ask, grade_all, load_grades, parse_grade, read_preamble
from tinyllava.eval.benchmarks._layouts import DataFiles

FILE = "mm-vet.json"
HUB = "data/test-*.parquet"
FILES = DataFiles("mmvet", folder="mm-vet")


def _read_samples(root: Root) -> tuple[dict[str, dict[str, Any]], Path]:
    """Read the release's samples by name, and the folder of their images."""
    path = FILES.find(root, FILE)
    if path is None:
        columns = ("question_id", "question", "answer", "capability")
        rows = FILES.read_rows(root, [HUB], columns, name=lambda row: f"{row['question_id']}.png")
        if rows:  # their images are full paths already, so the folder is empty
            return {
                row["question_id"]: {**row, "imagename": row["image"], "capability": row["capability"].split(",")}
                for row in rows
            }, Path()
    path = FILES.require(root, FILE, HUB)
    return read_json_file(path), path.parent / "images"


def to_release_name(question_id: str | int) -> str:
    """Convert LLaVA's id of a question (0, 1, ...) to its name in the release (v1_0, v1_1, ...)."""
    name = str(question_id)
    return name if name.startswith("v1_") else f"v1_{name}"


def round_as_numpy(value: float, decimals: int) -> float:
    """Round as numpy does: scale, then round half to even. The last digit can differ from Python's `round`."""
    return round(value * 10**decimals) / 10**decimals


def aggregate(
    capabilities: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    num_run: int | None = None,
    decimals: int = 1,
) -> dict[str, Any]:
    """Compute 100 x the mean score: in total, per capability, and per exact set of capabilities ("ocr+rec").

    `scores[i]` are the grades of sample i, one per run. All scores are means over the runs. `runs` are the totals of
    the runs, and `std` is their population standard deviation.
    """
    num_run = num_run or min(len(runs) for runs in scores)
    sums: dict[str, dict[str, list[float]]] = {"total": {}, "capability": {}, "integration": {}}
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in sums}
    for names, runs in zip(capabilities, scores, strict=True):
        groups = [("capability", name) for name in sorted(set(names))]
        groups += [("total", "total"), ("integration", "+".join(sorted(set(names))))]
        for kind, name in groups:
            counts[kind][name] += 1
            total = sums[kind].setdefault(name, [0.0] * num_run)
            sums[kind][name] = [before + score for before, score in zip(total, runs[:num_run], strict=True)]
    percent = {
        kind: {name: [value / counts[kind][name] * 100 for value in values] for name, values in groups.items()}
        for kind, groups in sums.items()
    }
    average = {
        kind: {name: round_as_numpy(sum(values) / num_run, decimals) for name, values in groups.items()}
        for kind, groups in percent.items()
    }
    totals = percent["total"]["total"]
    center = sum(totals) / num_run
    return {
        "total": average["total"]["total"],
        "std": round_as_numpy(math.sqrt(sum((value - center) ** 2 for value in totals) / num_run), decimals),
        "runs": [round_as_numpy(value, decimals) for value in totals],
        "per_capability": average["capability"],
        "capability_counts": dict(counts["capability"]),
        "per_integration": average["integration"],
        "integration_counts": dict(counts["integration"]),
    }


@dataclass
class Benchmark(benchmarks.Benchmark):
    """MM-Vet, graded by a judge. Without grades, only the upload file is written."""

    title = "MM-Vet"
    scorer = "yuweihao/MM-Vet acde843"
    folder = FILES.folder
    max_new_tokens = 1024
    variants: ClassVar = {"5-runs": {"runs": 5}}  # as in the paper: five grades of each answer
    is_judged = True

    grades: str | Path | None = None  # the file of grades; `ask` adds the missing ones
    ask: Ask | None = None  # the judge's client
    model: str = "gpt-4-0613"  # the judge's name in the grades
    runs: int = 1  # grades of each answer

    def questions(self, root: Root) -> list[Question]:
        """The questions of `mm-vet.json` or the Hub's table, in LLaVA's order if `llava-mm-vet.jsonl` exists."""
        samples, folder = _read_samples(root)
        llava = FILES.find(root, "llava-mm-vet.jsonl")
        ids = [q["question_id"] for q in read_jsonl(llava)] if llava else list(samples)
        questions = []
        for qid in ids:
            name = to_release_name(qid)
            if name not in samples:
                raise UserError(f"{llava} has the question {name}, which is not in the release.")
            sample = samples[name]
            image = (str(folder / sample["imagename"]),)
            capabilities = sorted(set(sample["capability"]))
            category, extra = "+".join(capabilities), {"capability": capabilities}
            questions.append(Question(name, qid, sample["question"], image, sample["answer"], category, extra=extra))
        return questions

    def key(self, record: Answer) -> str:
        """The name of the question in the release."""
        return to_release_name(record["question_id"])

    def evaluate(self, root: Root, pairs: list[Pair]) -> dict[str, Any]:
        """Ask the judge for missing grades, and aggregate all. Without `grades`, only write the upload file."""
        answered = {question.id: (question, record["text"]) for question, record in drop_missing(pairs)}
        files = {"mmvet_upload.json": {name: text for name, (_, text) in answered.items()}}
        if self.grades is None:
            if self.ask is not None:
                raise UserError("MM-Vet: a judge requires `grades`, the file for its grades.")
            items = [build_item(question, text, None, None) for question, text in answered.values()]
            return build_result(None, "MM-Vet: no judge; upload to whyu/MM-Vet_Evaluator", {}, items, files=files)
        graded = self._collect_grades(root, answered)
        items, failed = [], 0
        for name, (question, text) in answered.items():
            contents, scores = graded[name]["content"], graded[name]["score"][: self.runs]
            # A failed grade: its reply, parsed again, is not the score that was stored for it.
            failed += sum(map(ne, map(parse_grade, contents[: self.runs]), scores))
            items.append(build_item(question, text, contents, sum(scores) / self.runs))
        capabilities = [question.extra["capability"] for question, _ in answered.values()]
        scores = [graded[name]["score"] for name in answered]
        # The official metrics have one decimal. The score is not rounded, so that two models can be compared.
        exact = aggregate(capabilities, scores, self.runs, decimals=10)
        metrics = aggregate(capabilities, scores, self.runs)
        judges = sorted({judge for name in answered for judge in graded[name]["model"][: self.runs]})
        files["mmvet_grades.json"] = graded
        metric = f"MM-Vet, judged by {', '.join(judges)}"
        return build_result(exact["total"], metric, metrics, items, failed, files)

    def _collect_grades(self, root: Root, answered: dict[str, tuple[Question, str]]) -> dict[str, Any]:
        """The grades of all answers in the official form. Raises UserError if some are missing."""
        path = Path(self.grades)
        if self.ask is not None:
            hint = f"It holds the judge's few-shot preamble: download it from {SOURCE}."
            evaluator = FILES.require(root, "mm-vet_evaluator.py", hint=hint)
            graded = grade_all(self.ask, answered, path, self.model, read_preamble(evaluator), self.runs)
        else:
            graded = load_grades(path, answered)
        missing = [name for name in answered if len(graded.get(name, {"score": []})["score"]) < self.runs]
        if missing:
            raise UserError(
                f"{path} has no grades for {len(missing)} answers (first: {missing[0]}). Give --judge MODEL."
            )
        return graded
