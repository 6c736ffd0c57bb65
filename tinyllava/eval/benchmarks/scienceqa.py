"""ScienceQA test: 4,241 multiple-choice questions; published numbers are over the 2,017 that have a picture.

    tinyllava eval CHECKPOINT --tasks scienceqa --data ROOT         # scienceqa-full: the score is over all questions
                                                                    # scienceqa-image: the others are not asked
Rules: `eval_science_qa.py` of LLaVA c121f04 and TinyLLaVA 53f12c7; prompts: `convert_sqa_to_llava_base_prompt.py` of
LLaVA; category table: lupantech/ScienceQA `tools/evaluate_acc.py` 2cbf831.
Deviation: "with a picture" is what the release says; LLaVA looks for <image> in the answers' prompts, so that a missing
answer leaves the denominator. That number is `img_acc_by_prompt`.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import LETTER_ANSWER, Question, item, result, variants
from tinyllava.eval.benchmarks import _hub as hub
from tinyllava.eval.benchmarks._files import find, need, read_json, remedy

TITLE = "ScienceQA"
FOLDER = "scienceqa"
SCORER = "eval_science_qa.py, LLaVA c121f04"
MAX_NEW_TOKENS = 1024

LLAVA_FILE = "llava_test_CQM-A.json"
HUB = ("ScienceQA-FULL/{}-*.parquet", "ScienceQA-IMG/{}-*.parquet", "data/{}-*.parquet")
LETTERS = "ABCDE"
from_short_name = variants({"val": {"split": "val"}, "image": {"image_only": True}, "full": {"full": True}})
SUBJECTS = {"natural": "natural science", "social": "social science", "language": "language science"}


def questions(root: str | Path, split: str = "test", image_only: bool = False) -> list[Question]:
    """The split's questions: prompts of LLaVA's `llava_test_CQM-A.json` if it is there, else made by LLaVA's rule.

    The Hub's copy has no ids: a question is then SPLIT-ROW.
    """
    problems, folder = _problems(root, split)
    llava = find(root, FOLDER, LLAVA_FILE) if split == "test" else None
    prompts = {q["id"]: q["conversations"][0]["value"] for q in read_json(llava)} if llava else {}
    found = []
    for pid, problem in problems.items():
        if image_only and not problem["image"]:
            continue
        text = prompts[pid] if pid in prompts else build_prompt(problem, "CQM-A")[0]
        image = folder / pid / problem["image"] if problem["image"] else None
        found.append(
            Question(
                pid,
                pid,
                f"{text.replace('<image>', '').strip()}\n{LETTER_ANSWER}",
                (str(image),) if image else (),
                problem["answer"],
                problem["subject"],
                tuple(problem["choices"]),
                extra={"problem": problem},
            )
        )
    return found


def _problems(root: str | Path, split: str) -> tuple[dict[str, dict[str, Any]], Path]:
    """The split's problems by id, from the release or the Hub's copy, and the folder that their pictures lie in."""
    path = find(root, FOLDER, "problems.json")
    names = [pattern.format("validation" if split == "val" else split) for pattern in HUB]
    if path is None:
        copies = hub.rows(
            hub.tables(root, FOLDER, *names),
            *("question", "choices", "answer", "hint", "grade", "subject", "topic", "lecture", "solution"),
            name=lambda row: f"{row['number']}.png",
        )
        if copies:
            return {f"{split}-{row['number']}": row for row in copies}, Path()
    path = need(root, FOLDER, "problems.json", *names, hint=remedy("scienceqa"))
    problems, splits = read_json(path), read_json(need(root, FOLDER, "pid_splits.json", hint=remedy("scienceqa")))
    if split not in splits:
        raise UserError(f"unknown ScienceQA split '{split}'. Known: {', '.join(splits)}.")
    return {pid: problems[pid] for pid in splits[split]}, path.parent / "images" / split


def build_prompt(problem: Mapping[str, Any], prompt_format: str = "CQM-A") -> tuple[str, str]:
    """LLaVA's input and output text of a problem. C: hint, Q: question, M: options, L: lecture, E: solution, A: answer.

    Quirks kept: AL gives the solution and AE the lecture; every double space becomes a single one (once over).
    """
    asked, _, answered = prompt_format.partition("-")
    context = problem["hint"].strip() or "N/A"
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False))
    named = {"C": f"Context: {context}", "Q": f"Question: {problem['question']}", "M": f"Options: {options}"}
    told = {"L": problem["lecture"].replace("\\n", "\n"), "E": problem["solution"].replace("\\n", "\n")}
    lines = []
    for reason, letters in groupby(asked, key=told.__contains__):
        texts = [(told if reason else named)[letter] for letter in letters]
        lines += ["BECAUSE: " + " ".join(texts)] if reason else texts
    answer = LETTERS[problem["answer"]]
    if answered == "LEPA":
        output = "".join(f"{name}: {told[x]}\n" for name, x in (("LECTURE", "L"), ("SOLUTION", "E")) if told[x].strip())
        output += f"###\nANSWER: {answer}."
    else:
        reasons = {"AL": "AE", "AE": "AL"}.get(answered, answered)
        because = " BECAUSE:" if reasons[0] == "A" and len(reasons) > 1 else ""
        parts = [f"The answer is {answer}.{because}" if x == "A" else told[x] for x in reasons]
        output = "Answer: " + " ".join(parts)
    return _tidy("\n".join(lines)), _tidy(output)


def _tidy(text: str) -> str:
    text = text.replace("  ", " ").strip()
    return text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text


def choose_from(question: Question) -> tuple[str, ...]:
    """The letters of its options."""
    return tuple(LETTERS[: len(question.options)])


def parse_letter(text: str) -> str | None:
    """The letter of an answer: "B" itself, "B. ..." at the start, or the only "The answer is B." (any character for the
    period). None for all else: "B.", "(B)", "b" and " B" are wrong."""
    if text and text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    said = re.findall(r"The answer is ([A-Z]).", text)
    return said[0] if len(said) == 1 else None


def parse(text: str, num_choices: int) -> int | None:
    """The index of the chosen option, or None when there is no letter or it names no option."""
    letter = parse_letter(text)
    return LETTERS.index(letter) if letter and letter in LETTERS[:num_choices] else None


def aggregate(items: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Percent right, of all and with a picture, of {prediction (None: missing, wrong), choices, answer, has_image}.

    `img_acc` is None without any picture, where the official script divides by zero.
    """
    right, with_image = [], []
    for one in items:
        prediction = one["prediction"]
        right.append(prediction is not None and parse(prediction, len(one["choices"])) == one["answer"])
        with_image.append(bool(one["has_image"]))
    img = [correct for correct, has_image in zip(right, with_image, strict=True) if has_image]
    return {
        "total": len(right),
        "correct": sum(right),
        "acc": sum(right) / len(right) * 100 if right else None,
        "img_total": len(img),
        "img_correct": sum(img),
        "img_acc": sum(img) / len(img) * 100 if img else None,
    }


def categories(problems: Mapping[str, Mapping[str, Any]], results: Mapping[str, int]) -> dict[str, float]:
    """The official table: percent right by subject, context, grade and topic. `results`: indexes by id, -1 for none."""
    right = {pid: results[pid] == problem["answer"] for pid, problem in problems.items()}
    groups: dict[str, list[bool]] = {}
    for pid, p in problems.items():
        grade = int(p["grade"].removeprefix("grade"))
        names = [name for name, subject in SUBJECTS.items() if p["subject"] == subject]
        names += ["has_text"] * bool(p["hint"]) + ["has_image"] * bool(p["image"])
        names += ["no_context"] * (not p["hint"] and not p["image"])
        names += ["grade_1_6"] * (1 <= grade <= 6) + ["grade_7_12"] * (7 <= grade <= 12)
        for name in [*names, p["topic"], "average"]:
            groups.setdefault(name, []).append(right[pid])
    return {name: sum(values) / len(values) * 100 for name, values in groups.items()}


def tally(item: Mapping[str, Any]) -> dict[str, float]:
    """Only questions with a picture count, unless the score is over all."""
    return {"score": item["score"], "n": 1} if item["counts"] else {}


def evaluate(
    root: str | Path, pairs: list[tuple[Question, dict[str, Any] | None]], full: bool = False
) -> dict[str, Any]:
    """Accuracy over all and over pictures (the score, unless `full`); a missing answer is wrong, as officially."""
    full = full or not any(question.images for question, _ in pairs)
    items, samples, results = [], [], {}
    for question, record in pairs:
        text = record["text"] if record else None
        index = parse(text, len(question.options)) if text is not None else None
        results[question.id] = -1 if index is None else index
        has_image = bool(question.images)
        items.append(item(question, text, index, float(index == question.answer), counts=full or has_image))
        samples.append(
            {
                "prediction": text,
                "choices": question.options,
                "answer": question.answer,
                "has_image": has_image,
                "said_image": "<image>" in ((record or {}).get("prompt") or ""),
            }
        )
    metrics = aggregate(samples)
    by_prompt = aggregate({**sample, "has_image": sample["said_image"]} for sample in samples)
    metrics |= {f"{name}_by_prompt": by_prompt[name] for name in ("img_total", "img_correct", "img_acc")}
    metrics["categories"] = categories({q.id: q.extra["problem"] for q, _ in pairs}, results)
    metrics["results"] = results
    unparsed = sum(one["answer"] is not None and parse_letter(one["answer"]) is None for one in items)
    score, metric = (metrics["acc"], "ScienceQA accuracy") if full else (metrics["img_acc"], "ScienceQA-IMG accuracy")
    return result(score, metric, metrics, items, unparsed)
