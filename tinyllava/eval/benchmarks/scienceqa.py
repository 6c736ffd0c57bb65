"""ScienceQA test: 4,241 multiple-choice questions; published numbers are over the 2,017 that have an image.

    tinyllava eval CHECKPOINT --tasks scienceqa --data ROOT         # the score is over questions with an image
                                                                    # scienceqa-full: it is over all questions
                                                                    # scienceqa-image: only those with one are asked
Rules: `eval_science_qa.py` of LLaVA c121f04 and TinyLLaVA 53f12c7; prompts: `convert_sqa_to_llava_base_prompt.py` of
LLaVA; category table: lupantech/ScienceQA `tools/evaluate_acc.py` 2cbf831.
Deviation: whether a question has an image is read from the release. LLaVA looks for <image> in the answers' prompts, so
a missing answer is not in its denominator. That number is `img_acc_by_prompt`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from tinyllava.errors import UserError
from tinyllava.eval import benchmarks
from tinyllava.eval.benchmarks import (
    LETTER_ANSWER,
    OfficialAnswers,
    Pair,
    Question,
    Root,
    ScoredItem,
    Sums,
    build_item,
    build_result,
)
from tinyllava.eval.benchmarks._files import read_json_file, read_json_if_whole
from tinyllava.eval.benchmarks._layouts import DataFiles

LLAVA_FILE = "llava_test_CQM-A.json"
HUB = ("ScienceQA-FULL/{}-*.parquet", "ScienceQA-IMG/{}-*.parquet", "data/{}-*.parquet")
FILES = DataFiles("scienceqa", folder="scienceqa")
LETTERS = "ABCDE"
SUBJECTS = {"natural": "natural science", "social": "social science", "language": "language science"}
COLUMNS = ("question", "choices", "answer", "hint", "grade", "subject", "topic", "lecture", "solution")


def _read_problems(root: Root, split: str) -> tuple[dict[str, dict[str, Any]], Path]:
    """Read the split's problems by id, from the release or the Hub's tables, and the folder of their images."""
    path = FILES.find(root, "problems.json")
    patterns = [pattern.format("validation" if split == "val" else split) for pattern in HUB]
    if path is None:
        rows = FILES.read_rows(root, patterns, COLUMNS, name=lambda row: f"{row['number']}.png")
        if rows:  # their images are full paths already, so the folder is empty
            return {f"{split}-{row['number']}": row for row in rows}, Path()
    path = FILES.require(root, "problems.json", *patterns)
    problems, splits = read_json_file(path), read_json_file(FILES.require(root, "pid_splits.json"))
    if split not in splits:
        raise UserError(f"unknown ScienceQA split '{split}'. Known: {', '.join(splits)}.")
    return {pid: problems[pid] for pid in splits[split]}, path.parent / "images" / split


def build_prompt(problem: Mapping[str, Any], prompt_format: str = "CQM-A") -> tuple[str, str]:
    """Build LLaVA's input and output text of a problem, in a format such as CQM-A.

    C: hint, Q: question, M: options, L: lecture, E: solution, A: answer. Two quirks of the official code are kept: AL
    gives the solution and AE the lecture, and each double space becomes a single one (in one pass).
    """
    input_letters, _, output_letters = prompt_format.partition("-")
    context = problem["hint"].strip() or "N/A"
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False))
    sections = {"C": f"Context: {context}", "Q": f"Question: {problem['question']}", "M": f"Options: {options}"}
    reasoning = {"L": problem["lecture"].replace("\\n", "\n"), "E": problem["solution"].replace("\\n", "\n")}
    lines = []
    for reason, letters in groupby(input_letters, key=reasoning.__contains__):
        texts = [(reasoning if reason else sections)[letter] for letter in letters]
        lines += ["BECAUSE: " + " ".join(texts)] if reason else texts
    answer = LETTERS[problem["answer"]]
    if output_letters == "LEPA":
        output = "".join(
            f"{name}: {reasoning[x]}\n" for name, x in (("LECTURE", "L"), ("SOLUTION", "E")) if reasoning[x].strip()
        )
        output += f"###\nANSWER: {answer}."
    else:
        reasons = {"AL": "AE", "AE": "AL"}.get(output_letters, output_letters)
        because = " BECAUSE:" if reasons[0] == "A" and len(reasons) > 1 else ""
        sentences = [f"The answer is {answer}.{because}" if x == "A" else reasoning[x] for x in reasons]
        output = "Answer: " + " ".join(sentences)
    return _tidy("\n".join(lines)), _tidy(output)


def _tidy(text: str) -> str:
    """Replace double spaces, and remove a final "BECAUSE:" without a reason."""
    text = text.replace("  ", " ").strip()
    return text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text


def parse_letter(text: str) -> str | None:
    """Parse the letter of an answer: "B" alone, "B. ..." at the start, or "The answer is B." if that occurs once.

    Any character may be in the place of the period. Everything else is None: "B.", "(B)", "b" and " B".
    """
    if text and text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    letters = re.findall(r"The answer is ([A-Z]).", text)
    return letters[0] if len(letters) == 1 else None


def parse(text: str, num_choices: int) -> int | None:
    """The index of the chosen option; None if there is no letter, or no option with that letter."""
    letter = parse_letter(text)
    return LETTERS.index(letter) if letter and letter in LETTERS[:num_choices] else None


def aggregate(items: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute the percent of right answers, over all questions and over those with an image.

    An item has prediction (None: missing, which is wrong), choices, answer and has_image. `img_acc` is None if no
    question has an image; the official script fails then.
    """
    right, with_image = [], []
    for item in items:
        prediction = item["prediction"]
        right.append(prediction is not None and parse(prediction, len(item["choices"])) == item["answer"])
        with_image.append(bool(item["has_image"]))
    img = [correct for correct, has_image in zip(right, with_image, strict=True) if has_image]
    return {
        "total": len(right),
        "correct": sum(right),
        "acc": sum(right) / len(right) * 100 if right else None,
        "img_total": len(img),
        "img_correct": sum(img),
        "img_acc": sum(img) / len(img) * 100 if img else None,
    }


def score_official_groups(problems: Mapping[str, Mapping[str, Any]], results: Mapping[str, int]) -> dict[str, float]:
    """Compute the official table: percent right by subject, context, grade and topic.

    `results`: the index of the chosen option by id, -1 if there is none.
    """
    right = {pid: results[pid] == problem["answer"] for pid, problem in problems.items()}
    groups: dict[str, list[bool]] = {}
    for pid, p in problems.items():
        grade = int(p["grade"].removeprefix("grade"))
        names = [name for name, subject in SUBJECTS.items() if p["subject"] == subject]
        membership = {
            "has_text": bool(p["hint"]),
            "has_image": bool(p["image"]),
            "no_context": not p["hint"] and not p["image"],
            "grade_1_6": 1 <= grade <= 6,
            "grade_7_12": 7 <= grade <= 12,
        }
        names += [name for name, is_member in membership.items() if is_member]
        for name in [*names, p["topic"], "average"]:
            groups.setdefault(name, []).append(right[pid])
    return {name: sum(values) / len(values) * 100 for name, values in groups.items()}


@dataclass
class Benchmark(benchmarks.Benchmark):
    """ScienceQA by LLaVA's rules. The score is over the questions with an image, or with `full` over all."""

    title = "ScienceQA"
    scorer = "eval_science_qa.py, LLaVA c121f04"
    folder = FILES.folder
    max_new_tokens = 1024
    variants: ClassVar = {"val": {"split": "val"}, "image": {"image_only": True}, "full": {"full": True}}
    has_options = True

    split: str = "test"
    image_only: bool = False  # do not ask questions without an image
    full: bool = False  # the score is over all questions

    def questions(self, root: Root) -> list[Question]:
        """The split's questions, with the prompts of LLaVA's `llava_test_CQM-A.json` or, without it, by LLaVA's rule.

        The Hub's tables have no ids, so the id of a question is then SPLIT-ROW.
        """
        problems, folder = _read_problems(root, self.split)
        llava = FILES.find(root, LLAVA_FILE) if self.split == "test" else None
        prompts = {q["id"]: q["conversations"][0]["value"] for q in read_json_file(llava)} if llava else {}
        questions = []
        for pid, problem in problems.items():
            if self.image_only and not problem["image"]:
                continue
            text = prompts[pid] if pid in prompts else build_prompt(problem, "CQM-A")[0]
            image = folder / pid / problem["image"] if problem["image"] else None
            questions.append(
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
        return questions

    def read_official(self, path: Path, questions: list[Question]) -> OfficialAnswers | None:
        """The official results, {"results": {id: index}}, also with the texts that LLaVA adds as "outputs"."""
        document = read_json_if_whole(path)
        if not isinstance(document, dict) or not isinstance(document.get("results"), dict):
            return None
        letters = dict(enumerate(LETTERS))  # -1: the official script found no letter
        texts = {pid: letters.get(index, "") for pid, index in document["results"].items()}
        texts |= document.get("outputs") or {}
        return OfficialAnswers([{"question_id": pid, "text": text} for pid, text in texts.items()], questions)

    def choose_from(self, question: Question) -> tuple[str, ...]:
        """The letters of the options."""
        return tuple(LETTERS[: len(question.options)])

    def parse(self, text: str, question: Question) -> int | None:
        """The index of the chosen option, by the module's `parse`."""
        return parse(text, len(question.options))

    def evaluate(self, root: Root, pairs: list[Pair]) -> dict[str, Any]:
        """The accuracy over questions with an image and over all. A missing answer is wrong, as officially."""
        full = self.full or not any(question.images for question, _ in pairs)
        items, samples, results = [], [], {}
        for question, record in pairs:
            text = record["text"] if record else None
            index = None if text is None else self.parse(text, question)
            results[question.id] = -1 if index is None else index
            has_image = bool(question.images)
            items.append(build_item(question, text, index, float(index == question.answer), counts=full or has_image))
            samples.append(
                {
                    "prediction": text,
                    "choices": question.options,
                    "answer": question.answer,
                    "has_image": has_image,
                    "has_image_in_prompt": "<image>" in ((record or {}).get("prompt") or ""),
                }
            )
        metrics = aggregate(samples)
        by_prompt = aggregate({**sample, "has_image": sample["has_image_in_prompt"]} for sample in samples)
        metrics |= {f"{name}_by_prompt": by_prompt[name] for name in ("img_total", "img_correct", "img_acc")}
        metrics["categories"] = score_official_groups({q.id: q.extra["problem"] for q, _ in pairs}, results)
        metrics["results"] = results
        unparsed = sum(item["answer"] is not None and parse_letter(item["answer"]) is None for item in items)
        if full:
            return build_result(metrics["acc"], "ScienceQA accuracy", metrics, items, unparsed)
        return build_result(metrics["img_acc"], "ScienceQA-IMG accuracy", metrics, items, unparsed)

    def tally(self, item: ScoredItem) -> Sums:
        """The sums of an item; {} for a question without an image, unless the score is over all questions."""
        return super().tally(item) if item["counts"] else {}
