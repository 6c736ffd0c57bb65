"""MM-Vet's judge: the prompt, the reply, and when to ask again.

Source: `runs` of yuweihao/MM-Vet `mm-vet_evaluator.py`, acde843. The client is a function, so that tests need no judge.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Question
from tinyllava.eval.benchmarks._files import read_json

SOURCE = "github.com/yuweihao/MM-Vet, commit acde843"
JUDGE_MAX_TOKENS = 3  # of a reply, in one user message without a system message
RETRY = "\nPredict the correctness of the answer (digit): "
PREAMBLE_SHA256 = "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f"

Ask = Callable[[str, float], str | None]  # (prompt, temperature) -> reply


class RateLimited(Exception):
    """A judge client raises this to be asked the same again after a pause."""


class Grade(NamedTuple):
    """A judge's verdict. `content` is the parsed reply, or the last unparsed one, for which the score is 0."""

    score: float
    content: str | None
    parsed: bool


def judge_prompt(question: str, answer: str, prediction: str, preamble: str = "", retry: bool = False) -> str:
    """What the judge reads: the preamble and a last row of its table, to be completed with the grade."""
    answer = answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{preamble}\n{question} | {answer} | {prediction} | " + (RETRY if retry else "")


def official_preamble(path: Path) -> str:
    """The official preamble, out of the official `mm-vet_evaluator.py`; verified by its SHA-256."""
    match = re.search(r'^prompt = """(.*?)"""', path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    text = match.group(1) if match else ""
    if hashlib.sha256(text.encode()).hexdigest() != PREAMBLE_SHA256:
        raise UserError(
            f"the preamble in {path} is not the official one (SHA-256 {PREAMBLE_SHA256[:12]}...); see {SOURCE}."
        )
    return text


def parse_grade(reply: str | None) -> float | None:
    """The number before the first space if it lies in 0..1, else None: " 0.7", "0.5|" and "Score: 1" are no grades."""
    try:
        grade = float((reply or "").split(" ")[0])
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def judge(
    ask: Ask, question: str, answer: str, prediction: str, preamble: str = "", wait: Callable[[], None] | None = None
) -> Grade:
    """Ask until there is a grade: again with a last line more at temperatures 0, .5, 1, 1.5, 2, then the grade is 0.

    Quirks kept: the fifth such reply is not even read, and after a rate limit (a pause of 30 s, or `wait`) the five
    tries start anew where prompt and temperature were.
    """
    temperature, retry = 0.0, False
    while True:
        try:
            reply = ask(judge_prompt(question, answer, prediction, preamble, retry), temperature)
            for _ in range(5):
                score = parse_grade(reply)
                if score is not None:
                    return Grade(score, reply.split(" ")[0].strip(), True)
                retry = True
                reply = ask(judge_prompt(question, answer, prediction, preamble, retry), temperature)
                temperature += 0.5
            return Grade(0.0, reply, False)
        except RateLimited:
            time.sleep(30) if wait is None else wait()


def grade_all(
    ask: Ask, predictions: dict[str, tuple[Question, str]], grades_file: Path, model: str, preamble: str, runs: int = 1
) -> dict[str, Any]:
    """Fill `grades_file` (the official form) with `runs` grades of every prediction, saved after each: resumable."""
    grades = read_json(grades_file) if grades_file.exists() else {}
    for run in range(runs):
        for name, (question, text) in predictions.items():
            grade = grades.setdefault(name, {"model": [], "content": [], "score": []})
            if len(grade["score"]) > run:
                continue
            verdict = judge(ask, question.text, question.answer, text, preamble)
            grade["model"].append(model)
            grade["content"].append(verdict.content)
            grade["score"].append(verdict.score)
            part = grades_file.with_suffix(".part")
            part.write_text(json.dumps(grades, indent=4), encoding="utf-8")
            os.replace(part, grades_file)  # a kill leaves the old file or the new one, never half of one
    return grades
