"""Match an answers file, ours or the original's, to a benchmark's questions, and score it.

Answers are matched by id, and strictly: a missing, repeated or unknown answer is an error with the counts.
`--allow-partial` instead scores what is there as the official script would, and records the counts.
"""

import json
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Question, fingerprint, record_of
from tinyllava.eval.benchmarks._files import read_json
from tinyllava.eval.tasks import Task, find_task

ID_FIELDS = ("question_id", "questionId", "id")  # ours and LLaVA's, GQA's, MMMU's
TEXT_FIELDS = ("text", "response", "prediction", "answer")  # ours and LLaVA's, MMMU's, GQA's, VQAv2's
FIRST = 3  # examples of what does not fit

Answer = dict[str, Any]
Pair = tuple[Question, Answer | None]


def score_answers(
    task: str | Task, root: str | Path | None, answers: str | Path, *, allow_partial: bool = False, **options: Any
) -> dict[str, Any]:
    """What `evaluate` returns (see `tinyllava.eval.benchmarks`), with `task`, `title`, `scorer`, answer `counts`,
    the `prompts` that the answers file tells, by id, and the fingerprint of the `data`.

    `options` beside those of the task's variant (gqa: consistency; pope: eps; mmmu: unparsed; mmvet: grades, ask, ...).
    """
    task = find_task(task) if isinstance(task, str) else task
    task.check(options)
    root = task.place(root)
    questions = task.references(root, **options)
    records, broken = read_answers(Path(answers))
    try:
        pairs, counts, examples = match(task.benchmark, questions, records)
    except UserError as error:  # a prompt that no question can be read out of
        raise UserError(f"{answers}: {error}") from None
    counts["broken"], examples["broken"] = len(broken), [f"line {number} is no JSON" for number in broken]
    trouble = [_sentence(name, counts[name], examples[name]) for name in examples if counts[name]]
    if trouble and not allow_partial:
        raise UserError(
            f"{answers} does not answer the {len(questions)} questions of {task.name} one by one: "
            f"{', '.join(trouble)}.\n--allow-partial scores what is there."
        )
    if all(record is None for _, record in pairs):
        raise UserError(f"no answer in {answers} belongs to a question of {task.name}; is it of another task or data?")
    data = {"fingerprint": fingerprint(questions), "questions": len(questions)}
    made_by = {"task": task.name, "title": task.title, "scorer": task.benchmark.SCORER, "counts": counts}
    prompts = {question.id: record["prompt"] for question, record in pairs if record and record["prompt"]}
    return made_by | task.evaluate(root, pairs, **options) | {"prompts": prompts, "data": data}


def _sentence(what: str, count: int, examples: list[str]) -> str:
    more = ", ..." if count > FIRST else ""
    return f"{count} {what} ({', '.join(examples[:FIRST])}{more})"


def read_answers(path: Path) -> tuple[list[Answer], list[int]]:
    """The answer records in `path` with their `line`, and the numbers of lines that are no JSON, torn ones among them.

    JSON lines {question_id, text, prompt}; the official results files: a list of records or one object id -> answer; or
    MMMU's folder of SUBJECT/output.json.
    """
    if not path.exists():
        raise UserError(f"there is no answers file {path}.")
    if path.is_dir():
        files = sorted(path.glob("*/output.json"))
        if not files:
            raise UserError(f"{path} is a folder without SUBJECT/output.json in it: expected an answers file.")
        return [_record(one, file, line) for file in files for line, one in enumerate(read_json(file), start=1)], []
    data = path.read_bytes()  # a kill can tear a character apart: bytes, decoded line by line
    found: list[tuple[int, Any]] = []
    broken: list[int] = []
    try:
        whole = json.loads(data)  # also true of JSON lines that are one line
        if isinstance(whole, dict) and not any(name in whole for name in ID_FIELDS):
            whole = [{"question_id": qid, "text": answer} for qid, answer in whole.items()]
        found = list(enumerate(whole if isinstance(whole, list) else [whole], start=1))
    except ValueError:
        for number, line in enumerate(data.split(b"\n"), start=1):
            try:
                found += [(number, json.loads(line))] if line.strip() else []
            except ValueError:
                broken.append(number)
    return [_record(one, path, number) for number, one in found], broken


def _record(raw: Any, path: Path, line: int) -> Answer:
    """The record with question_id, text and prompt, whatever its format calls them."""
    fields = raw if isinstance(raw, dict) else {}
    qid = next((fields[name] for name in ID_FIELDS if name in fields), None)
    text = next((fields[name] for name in TEXT_FIELDS if name in fields), None)
    if qid is None or not isinstance(text, str):
        raise UserError(
            f"{path}, record {line}: an answer needs a question_id and a text, found {json.dumps(raw)[:120]}."
        )
    # TinyLLaVA's MMMU script writes its whole list of questions into every prompt.
    prompt = fields.get("prompt") if isinstance(fields.get("prompt"), str) else ""
    return {**fields, "question_id": qid, "text": text, "prompt": prompt, "line": line}


def match(
    benchmark: Any, questions: list[Question], records: list[Answer]
) -> tuple[list[Pair], dict[str, int], dict[str, list[str]]]:
    """Pairs in the order of the questions (None: no answer), counts, and the first answers that do not fit."""
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
    stray = {"missing": missing, "duplicate": duplicate, "unknown": [record["question_id"] for record in unknown]}
    counts = {"questions": len(questions), "answers": len(records)}
    counts |= {what: len(ids) for what, ids in stray.items()}
    return pairs, counts, {what: [repr(one) for one in ids[:FIRST]] for what, ids in stray.items()}
