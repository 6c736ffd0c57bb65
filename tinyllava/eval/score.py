"""Score an answers file, ours or the original's: `tinyllava score pope --data ROOT --answers FILE`.

Answers are matched to questions by id, and strictly: a missing, repeated or unknown answer is an error with the counts.
`--allow-partial` instead scores what is there as the official script would, and records the counts.
"""

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Question, record_of
from tinyllava.eval.benchmarks._files import read_json
from tinyllava.factory import Factory

ID_FIELDS = ("question_id", "questionId", "id")  # ours and LLaVA's, GQA's, MMMU's
TEXT_FIELDS = ("text", "response", "prediction", "answer")  # ours and LLaVA's, MMMU's, GQA's, VQAv2's

Answer = dict[str, Any]
Pair = tuple[Question, Answer | None]


def score_answers(
    task: str,
    root: str | Path,
    answers: str | Path,
    *,
    allow_partial: bool = False,
    split: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What `evaluate` returns (see `tinyllava.eval.benchmarks`), with `task`, `title`, `scorer` and answer `counts`.

    `options` go to the benchmark's `evaluate` (gqa: consistency; pope: eps; mmmu: unparsed; mmvet: grades, ask, ...).
    """
    benchmark = Factory("benchmarks").get(task)
    references = getattr(benchmark, "references", benchmark.questions)
    check_options(task, references, {"split": split} if split else {})
    check_options(task, benchmark.evaluate, options)
    questions = references(root, split=split) if split else references(root)
    records, broken = read_answers(Path(answers))
    pairs, counts, examples = match(benchmark, questions, records)
    counts["broken"] = len(broken)
    trouble = [f"{counts[name]} {name}" for name in ("missing", "duplicate", "unknown", "broken") if counts[name]]
    examples += [f"line {broken[0]}, which is no JSON (torn by a kill?)"] if broken else []
    if trouble and not allow_partial:
        raise UserError(
            f"{answers} does not answer the {len(questions)} questions of {task} one by one: {', '.join(trouble)}; "
            f"for example {', '.join(examples)}. --allow-partial scores what is there."
        )
    if all(record is None for _, record in pairs):
        raise UserError(f"no answer in {answers} belongs to a question of {task}; is it of another task or data?")
    made_by = {"task": task, "title": benchmark.TITLE, "scorer": benchmark.SCORER, "counts": counts}
    return made_by | benchmark.evaluate(root, pairs, **options)


def check_options(task: str, function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raise UserError for an option that `function` of this benchmark does not take."""
    known = [name for name in signature(function).parameters if name not in ("root", "pairs")]
    for name in options:
        if name not in known:
            raise UserError(f"{task} has no option '{name}'. It takes: {', '.join(known) or 'none'}.")


def read_answers(path: Path) -> tuple[list[Answer], list[int]]:
    """The answer records in `path`, and the numbers of lines that are no JSON.

    JSON lines {question_id, text, prompt}; the official results files: a list of records or one object id -> answer; or
    MMMU's folder of SUBJECT/output.json.
    """
    if not path.exists():
        raise UserError(f"there is no answers file {path}.")
    if path.is_dir():
        files = sorted(path.glob("*/output.json"))
        if not files:
            raise UserError(f"{path} is a folder without SUBJECT/output.json in it: expected an answers file.")
        return [_record(one, file) for file in files for one in read_json(file)], []
    data = path.read_bytes()  # a kill can tear a character apart: bytes, decoded line by line
    broken: list[int] = []
    try:
        whole = json.loads(data)  # also true of JSON lines that are one line
        found = whole if isinstance(whole, list) else [whole]
        if isinstance(whole, dict) and not any(name in whole for name in ID_FIELDS):
            found = [{"question_id": qid, "text": answer} for qid, answer in whole.items()]
    except ValueError:
        found = []
        for number, line in enumerate(data.split(b"\n"), start=1):
            try:
                found += [json.loads(line)] if line.strip() else []
            except ValueError:
                broken.append(number)
    return [_record(one, path) for one in found], broken


def _record(raw: Any, path: Path) -> Answer:
    """The record with question_id, text and prompt, whatever its format calls them."""
    fields = raw if isinstance(raw, dict) else {}
    qid = next((fields[name] for name in ID_FIELDS if name in fields), None)
    text = next((fields[name] for name in TEXT_FIELDS if name in fields), None)
    if qid is None or not isinstance(text, str):
        raise UserError(f"{path}: an answer needs a question_id and a text, found {json.dumps(raw)[:120]}.")
    # TinyLLaVA's MMMU script writes its whole list of questions into every prompt.
    prompt = fields.get("prompt") if isinstance(fields.get("prompt"), str) else ""
    return {**fields, "question_id": qid, "text": text, "prompt": prompt}


def match(
    benchmark: Any, questions: list[Question], records: list[Answer]
) -> tuple[list[Pair], dict[str, int], list[str]]:
    """Pairs in the order of the questions (None: no answer), how many answers fit, examples of those that do not."""
    key = getattr(benchmark, "key", lambda record: str(record["question_id"]))
    asked: dict[str, list[Question]] = {}
    for question in questions:
        asked.setdefault(key(record_of(question)), []).append(question)
    given: dict[str, list[Answer]] = {name: [] for name in asked}
    unknown: list[Answer] = []
    for record in records:
        given.get(key(record), unknown).append(record)
    pairs: list[Pair] = []
    missing, duplicate = [], []
    for name, group in asked.items():
        found = given[name]
        extra = max(0, len(found) - len(group))
        duplicate += [group[-1].id] * extra
        if extra and getattr(benchmark, "COUNT_DUPLICATES", False):
            group = group + [group[-1]] * extra
        found = found[-len(group) :] + [None] * (len(group) - len(found))
        missing += [q.id for q, record in zip(group, found, strict=True) if record is None and q.required]
        pairs += [(q, record) for q, record in zip(group, found, strict=True) if record is not None or q.required]
    examples = [f"{what} {ids[0]!r}" for what, ids in (("missing", missing), ("duplicate", duplicate)) if ids]
    examples += [f"unknown {unknown[0]['question_id']!r}"] if unknown else []
    counts = {"questions": len(questions), "answers": len(records)}
    counts |= {"missing": len(missing), "duplicate": len(duplicate), "unknown": len(unknown)}
    return pairs, counts, examples
