"""MM-Vet's judge: its prompt, how its reply is parsed, when it is asked again, and the file of grades.

Source: `runs` of yuweihao/MM-Vet `mm-vet_evaluator.py`, acde843. The client is a function, so tests need no model.
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
from tinyllava.eval.benchmarks._files import read_json_file, read_text_file
from tinyllava.files import parse_json

logger = logging.getLogger("tinyllava")

SOURCE = "github.com/yuweihao/MM-Vet, commit acde843"
JUDGE_MAX_TOKENS = 3  # of a reply; the request is one user message without a system message
RETRY = "\nPredict the correctness of the answer (digit): "
PREAMBLE_SHA256 = "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f"

Ask = Callable[[str, float], str | None]  # (prompt, temperature) -> reply


class RateLimited(Exception):
    """A judge client raises this if the same request should be repeated after a pause."""


class Grade(NamedTuple):
    """A judge's grade. `content` is the reply that was parsed; if none could be, the last reply, with score 0."""

    score: float
    content: str | None
    parsed: bool


def build_judge_prompt(question: str, answer: str, prediction: str, preamble: str = "", retry: bool = False) -> str:
    """Build the judge's prompt: the preamble, and the last row of its table, which the judge completes with a grade."""
    answer = answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{preamble}\n{question} | {answer} | {prediction} | " + (RETRY if retry else "")


def read_preamble(path: Path) -> str:
    """Read the preamble in the official `mm-vet_evaluator.py`. Raises UserError if its SHA-256 is wrong."""
    match = re.search(r'^prompt = """(.*?)"""', read_text_file(path), re.DOTALL | re.MULTILINE)
    text = match.group(1) if match else ""
    if hashlib.sha256(text.encode()).hexdigest() != PREAMBLE_SHA256:
        raise UserError(
            f"the preamble in {path} is not the official one (SHA-256 {PREAMBLE_SHA256[:12]}...); see {SOURCE}."
        )
    return text


def parse_grade(reply: str | None) -> float | None:
    """The number before the first space if it is in 0..1, else None: " 0.7", "0.5|" and "Score: 1" are not grades."""
    try:
        grade = float((reply or "").split(" ")[0])
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def judge(
    ask: Ask, question: str, answer: str, prediction: str, preamble: str = "", wait: Callable[[], None] | None = None
) -> Grade:
    """Ask until a reply is a grade: first the prompt, then up to five retries, at temperatures 0, .5, 1, 1.5 and 2.

    A retry adds the line RETRY. After the last one, the grade is 0. Two quirks of the official code are kept. The reply
    to the fifth retry is not read. After a rate limit (a pause of 30 s, or `wait`), prompt and temperature stay as they
    are, but there are five retries again.
    """
    temperature, retry = 0.0, False
    while True:
        try:
            reply = ask(build_judge_prompt(question, answer, prediction, preamble, retry), temperature)
            for _ in range(5):
                score = parse_grade(reply)
                if score is not None:
                    return Grade(score, reply.split(" ")[0].strip(), True)
                retry = True
                reply = ask(build_judge_prompt(question, answer, prediction, preamble, retry), temperature)
                temperature += 0.5
            return Grade(0.0, reply, False)
        except RateLimited:
            time.sleep(30) if wait is None else wait()


def grade_all(
    ask: Ask, predictions: dict[str, tuple[Question, str]], grades_file: Path, model: str, preamble: str, runs: int = 1
) -> dict[str, Any]:
    """Collect `runs` grades of each prediction, in the official form. The judge gives those not in `grades_file`.

    Each grade is appended to the file at once, so a kill loses none. Its key is a hash of judge, prompt and run, so a
    changed answer is graded again.
    """
    known = {line["key"]: line for line in read_grades(grades_file)}
    grades: dict[str, Any] = {name: {"model": [], "content": [], "score": []} for name in predictions}
    order = [(run, name) for run in range(runs) for name in predictions]
    grades_file.parent.mkdir(parents=True, exist_ok=True)
    remove_incomplete_line(grades_file)
    with grades_file.open("a", encoding="utf-8") as file:
        shown = {"console": messages, "transient": True, "disable": not messages.is_terminal}
        for run, name in track(order, f"asking {model}", **shown):
            question, text = predictions[name]
            prompt = build_judge_prompt(question.text, question.answer, text, preamble)
            key = hashlib.sha256(json.dumps([model, prompt, run]).encode()).hexdigest()[:16]
            if key not in known:
                grade = judge(ask, question.text, question.answer, text, preamble)
                known[key] = {"key": key, "id": name, "prediction": text, "run": run, "model": model}
                known[key] |= grade._asdict()
                file.write(json.dumps(known[key], ensure_ascii=False) + "\n")
                file.flush()
            for field in ("model", "content", "score"):
                grades[name][field].append(known[key][field])
    return grades


def read_grades(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file of grades, without an incomplete last line; [] if there is no file."""
    if not path.is_file():
        return []
    *complete, incomplete = path.read_bytes().split(b"\n")
    if incomplete:
        logger.warning("%s: its last line is incomplete and is not used", path)
    lines = []
    for number, line in enumerate(complete, start=1):
        try:
            grade = parse_json(line)
            lines.append(
                {name: grade[name] for name in ("key", "id", "prediction", "run", "model", "content", "score")}
            )
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number} is not a grade: {line[:80]!r}. Remove the line.") from None
    return lines


def remove_incomplete_line(path: Path) -> None:
    """Remove an incomplete last line, which a kill can leave, so that the next line can be appended."""
    if path.is_file():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def load_grades(path: Path, predictions: dict[str, tuple[Question, str]]) -> dict[str, Any]:
    """Load the grades in `path` in the official form.

    `path` is an official JSON file, or our JSON lines, of which those for these predictions are used. If a run has
    several lines, the last one counts.
    """
    if path.suffix != ".jsonl":
        return read_json_file(path)
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for line in read_grades(path):
        if line["id"] in predictions and line["prediction"] == predictions[line["id"]][1]:
            runs.setdefault(line["id"], {})[line["run"]] = line
    return {
        name: {field: [lines[run][field] for run in sorted(lines)] for field in ("model", "content", "score")}
        for name, lines in runs.items()
    }
