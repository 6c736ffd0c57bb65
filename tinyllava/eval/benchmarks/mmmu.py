"""MMMU val: 900 college questions of 30 subjects, 847 multiple-choice and 53 open; EvalAI scores the test split.

    tinyllava eval CHECKPOINT --tasks mmmu --data ROOT          # mmmu-test writes the file to upload

Rules: MMMU-Benchmark/MMMU bb0b95a, `eval_utils.py`, `data_utils.py`, `main_eval_only.py`, `main_parse_and_eval.py`.
Deviation: if the official parser finds no letter, it draws one at random, so a score depends on chance. Here such an
answer is wrong and counted as `unparsed`. mmmu-random draws as the official code does (seed 42, in its order).
"""

import ast
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tinyllava.errors import UserError
from tinyllava.eval import benchmarks
from tinyllava.eval.benchmarks import (
    LETTER_ANSWER,
    SHORT_ANSWER,
    OfficialAnswers,
    Pair,
    Question,
    Root,
    ScoredItem,
    build_item,
    build_result,
    drop_missing,
    group_items,
)
from tinyllava.eval.benchmarks._files import get_field, read_json_file
from tinyllava.eval.benchmarks._layouts import DataFiles
from tinyllava.eval.benchmarks._mmmu_open import parse_open, score_open

FILES = DataFiles("mmmu", folder="MMMU")
SPLITS = ("validation", "dev", "test")  # the first words of ids
CHOICE = "multiple-choice"
FILE = "anns_for_eval.json"
ANSWERS = ("answer_dict_val.json", "eval/answer_dict_val.json")
HUB = ("data/{}-*.parquet", "*/{}-*.parquet")  # lmms-eval's tables; the official ones, one folder per subject
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


def _select_split(annotations: list[dict[str, Any]], split: str | None, path: Path | None) -> list[dict[str, Any]]:
    """The annotations of `split`; with None, those of the first of val, dev and test that exists."""
    by_split = {name: [q for q in annotations if str(q.get("id")).startswith(name)] for name in SPLITS}
    if split is not None and not by_split[split]:
        raise UserError(f"{path} has no questions of the {split} split.")
    return by_split[split] if split else next((group for group in by_split.values() if group), annotations)


def _read_hub(root: Root, split: str | None) -> list[dict[str, Any]]:
    """Read the Hub's rows in the form of TinyLLaVA's file. Without `split`: those of validation, else of test."""
    splits = [[pattern.format(name) for pattern in HUB] for name in ([split] if split else ["validation", "test"])]
    patterns = next((patterns for patterns in splits if FILES.find_tables(root, *patterns)), splits[0])
    columns = ("id", "question", "options", "answer", "question_type")
    rows = FILES.read_rows(root, patterns, columns, image="image_1", name=lambda row: f"{row['id']}.png")
    return [_to_annotation(row) for row in rows]


def _to_annotation(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row of the Hub's tables to the form of TinyLLaVA's file."""
    index2ans, all_choices = label_options(ast.literal_eval(row["options"]))
    is_open, images = row["question_type"] != CHOICE, row["options"].count("<image ")
    answer = ast.literal_eval(row["answer"]) if is_open and row["answer"].startswith("[") else row["answer"]
    return {
        "id": row["id"],
        "prompt": build_prompt(row),
        "question_type": row["question_type"],
        "image": row["image_1"] if images < 2 else None,
        "answer": answer,
        **({} if is_open else {"index2ans": index2ans, "all_choices": all_choices}),
    }


def _build_question(q: dict[str, Any], answers: dict[str, Any], path: Path) -> Question:
    """Build the question of an annotation in `path`. If `answers` has it, that is the right answer."""
    qid = get_field(q, "id", path)
    image = (str(path.parent / "all_images" / q["image"]),) if q.get("image") else ()
    answer = answers[qid]["ground_truth"] if qid in answers else q.get("answer")
    answer = None if answer in ("", "?") else answer  # the test split has these in place of an answer
    if answer is None and not qid.startswith("test"):
        raise UserError(f"{path} has no right answer to {qid}: put the official {ANSWERS[0]} next to it.")
    index2ans = q.get("index2ans") or {}
    return Question(
        qid,
        qid,
        q.get("prompt") or build_prompt(q),
        image,
        answer,
        parse_subject(qid),
        tuple(index2ans.values()),
        extra={"question_type": q["question_type"], "index2ans": index2ans},
    )


def parse_subject(question_id: str) -> str:
    """The subject in an id: validation_Art_Theory_12 -> Art_Theory."""
    return "_".join(question_id.split("_")[1:-1])


def label_options(options: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Label options with letters from A; returns index2ans (letter -> option) and all_choices (the letters)."""
    index2ans = {chr(ord("A") + number): option for number, option in enumerate(options)}
    return index2ans, list(index2ans)


def build_prompt(question: Mapping[str, Any]) -> str:
    """Build the prompt of the official llava1.5 config. `options` is a list, or Python text as in the Hub's tables."""
    if question["question_type"] != CHOICE:
        return f"{question['question']}\n{SHORT_ANSWER}"
    options = question["options"]
    index2ans, _ = label_options(ast.literal_eval(options) if isinstance(options, str) else options)
    lines = "".join(f"({letter}) {option}\n" for letter, option in index2ans.items())
    return f"{question['question']}\n{lines}\n{LETTER_ANSWER}"


def parse_choice(response: str, all_choices: Sequence[str], index2ans: Mapping[str, str]) -> str | None:
    """Parse the chosen letter; None if the official parser would draw one at random.

    It searches, in this order, for "(B)" anywhere, for " B " anywhere and, in more than five words, for an option's
    text in any case. If there are several candidates, the last one counts. So "A dog" is A, and "B)", "[B]" and "b"
    cannot be parsed.
    """
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    for form in ("({})", " {} "):
        positions = {letter: response.rfind(form.format(letter)) for letter in all_choices}
        if any(position >= 0 for position in positions.values()):
            return _pick_last(positions)
    if len(response.split()) > 5:
        positions = {letter: response.lower().rfind(option.lower()) for letter, option in index2ans.items()}
        if any(position >= 0 for position in positions.values()):
            return _pick_last(positions)
    return None


def _pick_last(positions: Mapping[str, int]) -> str:
    return max(positions, key=lambda letter: positions[letter])  # if equal, the first, like numpy's argmax


def score_choice(prediction: str | None, answer: str | Sequence[str]) -> bool:
    """Whether the letter is the answer, or one of a list of answers."""
    return prediction == answer if isinstance(answer, str) else prediction in answer


def aggregate(items: Iterable[ScoredItem]) -> dict[str, dict[str, float]]:
    """Compute {num, acc} of each subject, `Overall-DOMAIN` and `Overall`, rounded to 3 decimals, in official order."""
    right = {subject: [item["score"] for item in group] for subject, group in group_items(items, "category").items()}
    unknown = sorted(set(right) - set(SUBJECTS))
    if unknown:
        raise UserError(f"MMMU has no subject {', '.join(map(repr, unknown))}: an id is SPLIT_SUBJECT_NUMBER.")
    accuracy = {
        subject: (sum(right[subject]) / len(right[subject]), len(right[subject]))
        for subject in SUBJECTS
        if subject in right
    }

    def average_subjects(subjects: Iterable[str]) -> dict[str, float]:
        known = [accuracy[subject] for subject in subjects if subject in accuracy]
        number = sum(n for _, n in known)
        return {"num": number, "acc": round(sum(acc * n for acc, n in known) / number, 3) if number else 0}

    table = {}
    for domain, subjects in DOMAINS.items():
        table[f"Overall-{domain}"] = average_subjects(subjects.split())
        for subject in subjects.split():
            if subject in accuracy:
                table[subject] = {"num": accuracy[subject][1], "acc": round(accuracy[subject][0], 3)}
    return table | {"Overall": average_subjects(SUBJECTS)}


@dataclass
class Benchmark(benchmarks.Benchmark):
    """MMMU by the official rules. Val is scored here; for test, the upload file is written."""

    title = "MMMU"
    scorer = "MMMU-Benchmark/MMMU bb0b95a"
    folder = FILES.folder
    max_new_tokens = 1024
    variants: ClassVar = {"val": {"split": "validation"}, "test": {"split": "test"}, "random": {"unparsed": "random"}}
    has_options = True

    split: str | None = None  # None: the first of val, dev and test that exists
    unparsed: str = "wrong"  # how an answer without a letter counts: "wrong", or "random" as in the official code

    def questions(self, root: Root) -> list[Question]:
        """The questions of TinyLLaVA's `anns_for_eval.json` with `all_images/`, or of the Hub's tables.

        The right answers come from the same file or from `answer_dict_val.json`. For questions whose options are
        several images, there is no `image`: TinyLLaVA answers them at random, and here they are asked without an image.
        """
        path = FILES.find(root, FILE)
        annotations = read_json_file(path) if path else _read_hub(root, self.split)
        if not annotations:
            FILES.require(root, FILE, *(pattern.format(self.split or "validation") for pattern in HUB))
        annotations = _select_split(annotations, self.split, path)
        answers = FILES.find(root, *ANSWERS)
        gold = read_json_file(answers) if answers else {}
        source = path or Path(root) / FILES.folder / HUB[0].format("*")
        return [_build_question(q, gold, source) for q in annotations]

    def references(self, root: Root) -> list[Question]:
        """The questions; if there is only the official `answer_dict_val.json`, its questions, which have no options."""
        if FILES.find(root, FILE) or not FILES.find(root, *ANSWERS):
            return self.questions(root)
        answers = read_json_file(FILES.require(root, *ANSWERS))
        return [
            Question(
                qid,
                qid,
                answer=q["ground_truth"],
                category=parse_subject(qid),
                extra={"question_type": q["question_type"]},
            )
            for qid, q in answers.items()
        ]

    def read_official(self, path: Path, questions: list[Question]) -> OfficialAnswers | None:
        """The folder of the official parser, with SUBJECT/output.json."""
        files = sorted(path.glob("*/output.json"))
        return OfficialAnswers([raw for file in files for raw in read_json_file(file)], questions) if files else None

    def choose_from(self, question: Question) -> tuple[str, ...]:
        """The letters of the options; () for an open question."""
        return tuple(question.extra["index2ans"])

    def evaluate(self, root: Root, pairs: list[Pair]) -> dict[str, Any]:
        """Score val; for test, write the upload file.

        If a question has no options (only `answer_dict_val.json` exists), the answer itself must be the letter, as in
        `main_eval_only.py`.
        """
        if self.unparsed not in ("wrong", "random"):
            raise UserError(f"unparsed must be 'wrong' or 'random', not '{self.unparsed}'.")
        draw = random.Random(42)
        items, unparsed = [], 0
        # In the official order of subjects, because random draws depend on the order.
        for question, record in sorted(drop_missing(pairs), key=lambda pair: pair[0].category):
            parsed = _parse(record, question)
            unparsed += parsed is None
            if parsed is None and self.unparsed == "random":
                parsed = draw.choice(list(record.get("index2ans") or question.extra["index2ans"]))
            items.append(_build_item(question, record["text"], parsed))
        if any(question.answer is None for question, _ in pairs):
            files = {"mmmu_upload.json": {item["id"]: _format_upload(item) for item in items}}
            return build_result(None, "MMMU test: upload to EvalAI challenge 2179", {}, items, unparsed, files)
        right = [item["score"] for item in items]
        score = 100 * sum(right) / len(right) if right else 0.0
        return build_result(score, "MMMU val accuracy", aggregate(items), items, unparsed)


def _parse(record: dict[str, Any], question: Question) -> Any:
    """Parse a choice to its letter (None if it cannot be read), and an open answer to all its meanings."""
    if question.extra["question_type"] != CHOICE:
        return parse_open(record["text"])
    index2ans = record.get("index2ans") or question.extra.get("index2ans")
    return parse_choice(record["text"], list(index2ans), index2ans) if index2ans else record["text"]


def _build_item(question: Question, text: str, parsed: Any) -> ScoredItem:
    is_choice, gold = question.extra["question_type"] == CHOICE, question.answer
    right = None if gold is None else float((score_choice if is_choice else score_open)(parsed, gold))
    return build_item(question, text, parsed if is_choice else sorted(parsed, key=str), right)


def _format_upload(item: ScoredItem) -> str:
    """The answer to upload: the letter of a choice ("" if there is none), or the text of an open answer."""
    return (item["parsed"] or "") if isinstance(item["parsed"], str | None) else item["answer"]
