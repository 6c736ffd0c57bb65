"""MMMU val: 900 college questions of 30 subjects, 847 multiple-choice and 53 open; the test answers are with EvalAI.

    tinyllava eval CHECKPOINT --tasks mmmu --data ROOT          # mmmu-test: the file to upload

Rules: MMMU-Benchmark/MMMU bb0b95a, `eval_utils.py`, `data_utils.py`, `main_eval_only.py`, `main_parse_and_eval.py`.
Deviation: where the official parser finds no letter it draws one at random, so that a number carries luck; here that is
wrong, counted as `unparsed`, and mmmu-random draws as the official code does (seed 42, in its order).
"""

import ast
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import LETTER_ANSWER, SHORT_ANSWER, Question, item, result, variants
from tinyllava.eval.benchmarks import _hub as hub
from tinyllava.eval.benchmarks._files import field_of, find, need, read_json, remedy
from tinyllava.eval.benchmarks._mmmu_open import parse_open, score_open

__all__ = ["parse_open", "score_open"]

TITLE = "MMMU"
FOLDER = "MMMU"
SCORER = "MMMU-Benchmark/MMMU bb0b95a"
MAX_NEW_TOKENS = 1024

SPLITS = ("validation", "dev", "test")  # how ids begin
from_short_name = variants(
    {"val": {"split": "validation"}, "test": {"split": "test"}, "random": {"unparsed": "random"}}
)

CHOICE = "multiple-choice"
FILE = "anns_for_eval.json"
ANSWERS = ("answer_dict_val.json", "eval/answer_dict_val.json")
HUB = ("data/{}-*.parquet", "*/{}-*.parquet")  # lmms-eval's, and the official one with a folder for each subject
DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
SUBJECTS = sorted(subject for subjects in DOMAINS.values() for subject in subjects.split())  # the official order


def questions(root: str | Path, split: str | None = None) -> list[Question]:
    """The questions of TinyLLaVA's `anns_for_eval.json` with `all_images/`, or of the Hub's tables; the answers from
    either or from `answer_dict_val.json`.

    TinyLLaVA answers questions without `image` (several pictures as options) at random; here they are asked as text.
    """
    path = find(root, FOLDER, FILE)
    annotations = read_json(path) if path else _hub_questions(root, split)
    if not annotations:
        need(root, FOLDER, FILE, *(pattern.format(split or "validation") for pattern in HUB), hint=remedy("mmmu"))
    annotations = _of_split(annotations, split, path)
    path = path or Path(root) / FOLDER / HUB[0].format("*")
    answers = find(root, FOLDER, *ANSWERS)
    gold = read_json(answers) if answers else {}
    found = []
    for q in annotations:
        qid = field_of(q, "id", path)
        image = (str(path.parent / "all_images" / q["image"]),) if q.get("image") else ()
        answer = gold[qid]["ground_truth"] if qid in gold else q.get("answer")
        text = q.get("prompt") or build_prompt(q)
        choices = q.get("index2ans") or {}
        extra = {"question_type": q["question_type"], "index2ans": choices}
        answer = None if answer in ("", "?") else answer  # how the test split withholds it
        if answer is None and not qid.startswith("test"):
            raise UserError(f"{path} has no answer to {qid}: put the official {ANSWERS[0]} beside it.")
        found.append(Question(qid, qid, text, image, answer, subject_of(qid), tuple(choices.values()), extra=extra))
    return found


def references(root: str | Path, split: str | None = None) -> list[Question]:
    """What scoring needs: the questions, or the official `answer_dict_val.json` alone, which knows no options."""
    if find(root, FOLDER, FILE) or not find(root, FOLDER, *ANSWERS):
        return questions(root, split)
    path = need(root, FOLDER, *ANSWERS)
    return [
        Question(
            qid, qid, answer=q["ground_truth"], category=subject_of(qid), extra={"question_type": q["question_type"]}
        )
        for qid, q in read_json(path).items()
    ]


def _of_split(annotations: list[dict[str, Any]], split: str | None, path: Path | None) -> list[dict[str, Any]]:
    """Those of `split`; None takes the first of val, dev and test that is there."""
    by_split = {one: [q for q in annotations if str(q.get("id")).startswith(one)] for one in SPLITS}
    if split is not None and not by_split[split]:
        raise UserError(f"{path} has no questions of the {split} split.")
    return by_split[split] if split else next((one for one in by_split.values() if one), annotations)


def _hub_questions(root: str | Path, split: str | None) -> list[dict[str, Any]]:
    """The tables' rows in the form of TinyLLaVA's file; validation before test."""
    wanted = [split] if split else ["validation", "test"]
    splits = [[pattern.format(one) for pattern in HUB] for one in wanted]
    files = next((files for names in splits if (files := hub.tables(root, FOLDER, *names))), [])
    columns = ("id", "question", "options", "answer", "question_type")
    found = []
    for row in hub.rows(files, *columns, picture="image_1", name=lambda row: f"{row['id']}.png"):
        index2ans, all_choices = choices(ast.literal_eval(row["options"]))
        is_open, pictures = row["question_type"] != CHOICE, row["options"].count("<image ")
        answer = ast.literal_eval(row["answer"]) if is_open and row["answer"].startswith("[") else row["answer"]
        found.append(
            {
                "id": row["id"],
                "prompt": build_prompt(row),
                "question_type": row["question_type"],
                "image": row["image_1"] if pictures < 2 else None,
                "answer": answer,
                **({} if is_open else {"index2ans": index2ans, "all_choices": all_choices}),
            }
        )
    return found


def subject_of(question_id: str) -> str:
    """validation_Art_Theory_12 -> Art_Theory."""
    return "_".join(question_id.split("_")[1:-1])


def choices(options: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """index2ans and all_choices of a list of options: letters from A."""
    index2ans = {chr(ord("A") + number): option for number, option in enumerate(options)}
    return index2ans, list(index2ans)


def build_prompt(question: Mapping[str, Any]) -> str:
    """The prompt of the official llava1.5 config. `options` is a list, or its text as the Hub has it."""
    if question["question_type"] != CHOICE:
        return f"{question['question']}\n{SHORT_ANSWER}"
    options = question["options"]
    index2ans, _ = choices(ast.literal_eval(options) if isinstance(options, str) else options)
    lines = "".join(f"({letter}) {option}\n" for letter, option in index2ans.items())
    return f"{question['question']}\n{lines}\n{LETTER_ANSWER}"


def choose_from(question: Question) -> tuple[str, ...]:
    """The letters of its options; none of an open question."""
    return tuple(question.extra["index2ans"])


def parse_choice(response: str, all_choices: Sequence[str], index2ans: Mapping[str, str]) -> str | None:
    """The chosen letter, or None where the official parser draws one at random.

    In this order: "(B)" anywhere; " B " anywhere; in more than five words, an option's text in any case. Of several
    candidates it is the one that occurs last. So "A dog" is A, and "B)", "[B]", "b" are not parsed.
    """
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    for form in ("({})", " {} "):
        at = {letter: response.rfind(form.format(letter)) for letter in all_choices}
        if any(position >= 0 for position in at.values()):
            return _last(at)
    if len(response.split()) > 5:
        at = {letter: response.lower().rfind(option.lower()) for letter, option in index2ans.items()}
        if any(position >= 0 for position in at.values()):
            return _last(at)
    return None


def _last(positions: Mapping[str, int]) -> str:
    return max(positions, key=lambda letter: positions[letter])  # of equals the first, like numpy's argmax


def score_choice(prediction: str | None, answer: str | Sequence[str]) -> bool:
    """Whether the letter is the answer, or one of a list of answers."""
    return prediction == answer if isinstance(answer, str) else prediction in answer


def aggregate(items: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """{num, acc} by subject, `Overall-DOMAIN` and `Overall`: means over questions, rounded to 3, in official order."""
    right: dict[str, list[float]] = {}
    for one in items:
        right.setdefault(one["category"], []).append(one["score"])
    unknown = sorted(set(right) - set(SUBJECTS))
    if unknown:
        raise UserError(f"MMMU has no subject {', '.join(map(repr, unknown))}: an id is SPLIT_SUBJECT_NUMBER.")
    accuracy = {
        subject: (sum(right[subject]) / len(right[subject]), len(right[subject]))
        for subject in SUBJECTS
        if subject in right
    }

    def overall(subjects: Iterable[str]) -> dict[str, float]:
        known = [accuracy[subject] for subject in subjects if subject in accuracy]
        number = sum(n for _, n in known)
        return {"num": number, "acc": round(sum(acc * n for acc, n in known) / number, 3) if number else 0}

    table = {}
    for domain, subjects in DOMAINS.items():
        table[f"Overall-{domain}"] = overall(subjects.split())
        for subject in subjects.split():
            if subject in accuracy:
                table[subject] = {"num": accuracy[subject][1], "acc": round(accuracy[subject][0], 3)}
    return table | {"Overall": overall(SUBJECTS)}


def evaluate(
    root: str | Path, pairs: list[tuple[Question, dict[str, Any] | None]], unparsed: str = "wrong"
) -> dict[str, Any]:
    """Score val; for test make the upload file. Without options (answer_dict_val.json alone, an answers file of parsed
    letters) a choice counts as given, as in `main_eval_only.py`."""
    if unparsed not in ("wrong", "random"):
        raise UserError(f"unparsed must be 'wrong' or 'random', not '{unparsed}'.")
    draw = random.Random(42)
    items, lost = [], 0
    for question, record in sorted(pairs, key=lambda pair: pair[0].category):  # stable: the official order of subjects
        if record is None:
            continue
        text = record["text"]
        if question.extra["question_type"] != CHOICE:
            parsed: Any = parse_open(text)
            right = question.answer is not None and score_open(parsed, question.answer)
            parsed = sorted(parsed, key=str)
        else:
            index2ans = record.get("index2ans") or question.extra.get("index2ans")
            parsed = parse_choice(text, list(index2ans), index2ans) if index2ans else text
            lost += parsed is None
            if parsed is None and unparsed == "random":
                parsed = draw.choice(list(index2ans))
            right = question.answer is not None and score_choice(parsed, question.answer)
        items.append(item(question, text, parsed, None if question.answer is None else float(right)))
    if any(question.answer is None for question, _ in pairs):
        upload = {o["id"]: (o["parsed"] or "") if isinstance(o["parsed"], str | None) else o["answer"] for o in items}
        return result(None, "MMMU test: upload to EvalAI challenge 2179", {}, items, lost, {"mmmu_upload.json": upload})
    right = [one["score"] for one in items]
    score = 100 * sum(right) / len(right) if right else 0.0
    return result(score, "MMMU val accuracy", aggregate(items), items, lost)
