"""Score an answers file, in our format or the original's: match its answers to a benchmark's questions by id.

Missing, repeated and unknown answers are an error that names their counts. With `--allow-partial`, the answers that
match are scored as the official script does, and the counts are recorded.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Answer, Benchmark, Pair, Question, Root, hash_questions, to_answer_fields
from tinyllava.eval.benchmarks._files import explain_form
from tinyllava.eval.tasks import Task, find_task
from tinyllava.files import parse_json

ID_FIELDS = ("question_id", "questionId", "id")  # ours and LLaVA's, GQA's, MMMU's
TEXT_FIELDS = ("text", "response", "prediction", "answer")  # ours and LLaVA's, MMMU's, GQA's, VQAv2's
FIRST = 3  # examples in an error


class Match(NamedTuple):
    """Questions with their answers, in the order of the questions, and the ids that do not match."""

    pairs: list[Pair]
    counts: dict[str, int]
    examples: dict[str, list[str]]  # the first missing, duplicate and unknown ids


def score_answers(
    task: str | Task, root: Root | None, answers: str | Path, *, allow_partial: bool = False, **options: Any
) -> dict[str, Any]:
    """Score an answers file; returns what the benchmark's `evaluate` returns, and a few fields more.

    They are `task`, `title`, `scorer`, the `counts` of answers, the `prompts` of the file by question id, and the hash
    of the `data`. `options`: options of the benchmark, such as gqa's consistency, pope's eps or mmvet's grades. Raises
    UserError if the answers do not match the questions.
    """
    task = (find_task(task) if isinstance(task, str) else task).set_options(**options)
    root = task.locate(root)
    questions = task.read_questions(root, for_scoring=True)
    if not questions:
        raise UserError(f"{task.name} has no questions: nothing was found in {root}. Check --data.")
    records, questions, broken_lines = read_answers_file(Path(answers), task.benchmark, questions)
    try:
        pairs, counts, examples = match_answers(task.benchmark, questions, records)
    except UserError as error:  # the benchmark's `key` found no question in a prompt
        raise UserError(f"{answers}: {error}") from None
    counts["broken"], examples["broken"] = len(broken_lines), [f"line {number} is not JSON" for number in broken_lines]
    problems = [_count_problem(name, counts[name], examples[name]) for name in examples if counts[name]]
    if problems and not allow_partial:
        raise UserError(
            f"{answers} does not have one answer to each of the {len(questions)} questions of {task.name}: "
            f"{', '.join(problems)}.\n--allow-partial scores the answers that match."
        )
    if all(record is None for _, record in pairs):
        raise UserError(
            f"no answer in {answers} belongs to a question of {task.name}. Is the file for another task or other data?"
        )
    data = {"fingerprint": hash_questions(questions), "questions": len(questions)}
    facts = {"task": task.name, "title": task.title, "scorer": task.benchmark.scorer, "counts": counts}
    prompts = {question.id: record["prompt"] for question, record in pairs if record and record["prompt"]}
    return facts | task.evaluate(root, pairs) | {"prompts": prompts, "data": data}


def _count_problem(name: str, count: int, examples: list[str]) -> str:
    more = ", ..." if count > FIRST else ""
    return f"{count} {name} ({', '.join(examples[:FIRST])}{more})"


class AnswersFile(NamedTuple):
    """The content of an answers file: records with their `line`, the questions it is for, and lines without JSON."""

    records: list[Answer]
    questions: list[Question]
    broken_lines: list[int]


def read_answers_file(path: Path, benchmark: Benchmark, questions: list[Question]) -> AnswersFile:
    """Read `path`, which has the form of the benchmark's official tool, or one of these forms.

    A file of JSON lines {question_id, text, prompt}, a list of such records, or an object id -> answer. The names of
    other projects for these fields are known. A killed script leaves an incomplete line.
    """
    if not path.exists():
        raise UserError(f"there is no answers file {path}.")
    with explain_form(
        f"{path}", "Give the file that the official tool wrote, or JSON lines with question_id and text."
    ):
        official = benchmark.read_official(path, questions)
    if official is not None:
        records = [_to_answer(raw, path, number) for number, raw in enumerate(official.records, start=1)]
        return AnswersFile(records, official.questions, [])
    if path.is_dir():
        has_tool = type(benchmark).read_official is not Benchmark.read_official
        tool = f", or the folder of {benchmark.title}'s official tool" if has_tool else ""
        raise UserError(f"{path} is a folder. Give an answers file{tool}.")
    data = path.read_bytes()  # bytes, decoded line by line, because a kill can cut inside a character
    numbered: list[tuple[int, Any]] = []
    broken_lines: list[int] = []
    try:
        document = parse_json(data)  # this also reads a file of JSON lines that has only one line
        if isinstance(document, dict) and not any(name in document for name in ID_FIELDS):
            document = [{"question_id": qid, "text": answer} for qid, answer in document.items()]
        numbered = list(enumerate(document if isinstance(document, list) else [document], start=1))
    except ValueError:
        for number, line in enumerate(data.split(b"\n"), start=1):
            try:
                numbered += [(number, parse_json(line))] if line.strip() else []
            except ValueError:
                broken_lines.append(number)
    return AnswersFile([_to_answer(raw, path, number) for number, raw in numbered], questions, broken_lines)


def _to_answer(raw: Any, path: Path, line: int) -> Answer:
    """Add question_id, text and prompt to a record, whatever their names are in its format."""
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


def match_answers(benchmark: Benchmark, questions: list[Question], records: list[Answer]) -> Match:
    """Match answers to questions by the benchmark's `key`. Several questions with one key are matched in their order.

    Raises UserError if the benchmark finds no question in a prompt.
    """
    questions_by_key: dict[str, list[Question]] = {}
    for question in questions:
        questions_by_key.setdefault(benchmark.key(to_answer_fields(question)), []).append(question)
    answers_by_key: dict[str, list[Answer]] = {key: [] for key in questions_by_key}
    unknown: list[Answer] = []
    for record in records:
        answers_by_key.get(benchmark.key(record), unknown).append(record)
    pairs: list[Pair] = []
    missing, duplicate = [], []
    for key, group in questions_by_key.items():
        answers = answers_by_key[key]
        surplus = max(0, len(answers) - len(group))
        duplicate += [group[-1].id] * surplus
        if surplus and benchmark.counts_duplicates:
            group = group + [group[-1]] * surplus
        # The last answers count: official scripts let a later line replace an earlier one.
        matched = answers[-len(group) :] + [None] * (len(group) - len(answers))
        missing += [q.id for q, record in zip(group, matched, strict=True) if record is None and q.required]
        pairs += [(q, record) for q, record in zip(group, matched, strict=True) if record is not None or q.required]
    misfits = {"missing": missing, "duplicate": duplicate, "unknown": [record["question_id"] for record in unknown]}
    counts = {"questions": len(questions), "answers": len(records)}
    counts |= {name: len(ids) for name, ids in misfits.items()}
    return Match(pairs, counts, {name: [f"{qid!r:.80}" for qid in ids[:FIRST]] for name, ids in misfits.items()})
