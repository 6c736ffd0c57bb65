"""MM-Vet's judge: the prompt, the reply, when to ask again, and the file that keeps the grades.

Source: `runs` of yuweihao/MM-Vet `mm-vet_evaluator.py`, acde843. The client is a function, so that tests need no judge.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track

from tinyllava.console import messages
from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Question
from tinyllava.eval.benchmarks._files import read_json

logger = logging.getLogger("tinyllava")

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
    """`runs` grades of every prediction, in the official form; those that `grades_file` lacks are asked for.

    The file gets a line a grade, as they come, under a key of all that decides it (judge, prompt, run), so that a kill
    loses none and a changed answer is graded anew.
    """
    kept = {line["key"]: line for line in read_grades(grades_file)}
    grades: dict[str, Any] = {name: {"model": [], "content": [], "score": []} for name in predictions}
    wanted = [(run, name) for run in range(runs) for name in predictions]
    grades_file.parent.mkdir(parents=True, exist_ok=True)
    cut_torn_line(grades_file)
    with grades_file.open("a", encoding="utf-8") as file:
        shown = {"console": messages, "transient": True, "disable": not messages.is_terminal}
        for run, name in track(wanted, f"asking {model}", **shown):
            question, text = predictions[name]
            prompt = judge_prompt(question.text, question.answer, text, preamble)
            key = hashlib.sha256(json.dumps([model, prompt, run]).encode()).hexdigest()[:16]
            if key not in kept:
                verdict = judge(ask, question.text, question.answer, text, preamble)
                kept[key] = {"key": key, "id": name, "prediction": text, "run": run, "model": model}
                kept[key] |= verdict._asdict()
                file.write(json.dumps(kept[key], ensure_ascii=False) + "\n")
                file.flush()
            for field in ("model", "content", "score"):
                grades[name][field].append(kept[key][field])
    return grades


def read_grades(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of grades (none if it is not there), without a last one that a kill tore."""
    if not path.is_file():
        return []
    *whole, torn = path.read_bytes().split(b"\n")
    if torn:
        logger.warning("%s: its last line is torn, and counts for nothing", path)
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            grade = json.loads(line)
            lines.append(
                {name: grade[name] for name in ("key", "id", "prediction", "run", "model", "content", "score")}
            )
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number} is no grade: {line[:80]!r}. Remove the line.") from None
    return lines


def cut_torn_line(path: Path) -> None:
    """Make room for the next line after a kill."""
    if path.is_file():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def given_grades(path: Path, predictions: dict[str, tuple[Question, str]]) -> dict[str, Any]:
    """The grades in `path` in the official form: official JSON, or those of our lines that are of these predictions, of
    which the last of a run counts."""
    if path.suffix != ".jsonl":
        return read_json(path)
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for line in read_grades(path):
        if line["id"] in predictions and line["prediction"] == predictions[line["id"]][1]:
            runs.setdefault(line["id"], {})[line["run"]] = line
    return {
        name: {field: [of[run][field] for run in sorted(of)] for field in ("model", "content", "score")}
        for name, of in runs.items()
    }
