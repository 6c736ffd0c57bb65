"""TextVQA 0.5.1 val: 5,000 questions about text in OpenImages images, by default with OCR tokens in the prompt.

    tinyllava eval CHECKPOINT --tasks textvqa,textvqa-no-ocr --data ROOT

The published numbers of LLaVA and TinyLLaVA have Rosetta's OCR tokens in the prompt, which are worth ten points or
more. So this metric is called "TextVQA (OCR)", and the one without OCR tokens "TextVQA (no OCR)". The two cannot be
compared.

Rules: `eval_textvqa.py` and `m4c_evaluator.py` of TinyLLaVA 53f12c7 (the same as in LLaVA c121f04).
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from tinyllava.errors import UserError
from tinyllava.eval import benchmarks
from tinyllava.eval.benchmarks import (
    SHORT_ANSWER,
    Answer,
    OfficialAnswers,
    Pair,
    Question,
    Root,
    average,
    build_item,
    build_result,
    drop_missing,
    to_answer_fields,
)
from tinyllava.eval.benchmarks._files import get_field, read_json_file, read_json_if_whole, read_jsonl
from tinyllava.eval.benchmarks._layouts import DataFiles
from tinyllava.eval.benchmarks._vqa import normalize_m4c, score_leave_one_out

OCR = "Reference OCR token: "
LLAVA_FILE = "llava_textvqa_val_v051_ocr.jsonl"
FILE = "TextVQA_0.5.1_{}.json"
OCR_FILE = "TextVQA_Rosetta_OCR_v0.2_{}.json"
FILES = DataFiles("textvqa", folder="textvqa")


class PromptRecord(NamedTuple):
    """The prompt of one question, from LLaVA's file or built from the release."""

    image_id: str
    prompt: str
    image: str  # file name


def _name_tables(split: str) -> str:
    return f"data/{'validation' if split == 'val' else split}-*.parquet"


def _read_hub(root: Root, split: str, with_images: bool) -> list[dict[str, Any]]:
    columns = ("image_id", "question_id", "question", "answers", "ocr_tokens")
    name = (lambda row: f"{row['image_id']}.jpg") if with_images else None
    return FILES.read_rows(root, [_name_tables(split)], columns, name=name)


def _read_release(root: Root, split: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Read the official records; without their file, return the Hub's `rows`."""
    path = FILES.find(root, FILE.format(split))
    return get_field(read_json_file(path), "data", path) if path else rows


def _read_ocr_tokens(root: Root, split: str, rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Read the OCR tokens by image id, from Rosetta's file or the Hub's `rows`."""
    name = OCR_FILE.format(split)
    if rows and not FILES.find(root, name):
        return {row["image_id"]: row["ocr_tokens"] for row in rows}
    hint = f"The prompts contain OCR tokens: add {LLAVA_FILE} or {name}, or use the task textvqa-no-ocr."
    path = FILES.require(root, name, hint=hint)
    return {r["image_id"]: r["ocr_tokens"] for r in get_field(read_json_file(path), "data", path)}


def _build_prompt(question: str, tokens: list[str]) -> str:
    # No line break in a token: the official code matches answers to questions by the lines of the prompt.
    line = OCR + ", ".join(" ".join(token.split()) for token in tokens) + "\n" if tokens else ""
    return f"{question}\n{line}{SHORT_ANSWER}"


def extract_question(prompt: str) -> str:
    """Extract the question of a prompt, in lower case, as the official code does. Raises UserError where that fails."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        legacy = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if legacy:
            return legacy.group(1).lower()
    elif OCR in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(OCR.rstrip()) else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise UserError(f"no question can be found in the TextVQA prompt {prompt[:80]!r}.")


def extract_question_before_ocr(prompt: str) -> str:
    """Like `extract_question`, but also works if an OCR token contains a line break. The official code fails then."""
    question, ocr, _ = prompt.partition(f"\n{OCR}")
    return question.lower() if ocr else extract_question(prompt)


def normalize(text: str) -> str:
    """Normalise as EvalAI (M4C) does. It differs from the VQA v2 scorer in commas, question marks and `'s`."""
    return normalize_m4c(text)


def score(prediction: str, answers: list[str]) -> float:
    """The accuracy in 0..1 against ten answers: leave-one-out as in VQAv2, but all texts are always normalised."""
    if len(answers) != 10:
        raise UserError(f"TextVQA requires ten right answers to a question, found {len(answers)}.")
    return score_leave_one_out(
        normalize(prediction), [(normalize(answer), human) for human, answer in enumerate(answers)]
    )


@dataclass
class Benchmark(benchmarks.Benchmark):
    """TextVQA by LLaVA's rules. Val is scored here; for test, the upload file is written."""

    title = "TextVQA"
    scorer = "m4c_evaluator, TinyLLaVA 53f12c7"
    folder = FILES.folder
    variants: ClassVar = {"val": {"split": "val"}, "test": {"split": "test"}, "no-ocr": {"ocr": False}}
    counts_duplicates = True  # in the official code, the mean is over the lines of the answers file

    split: str = "val"
    ocr: bool = True  # OCR tokens in the prompt

    def questions(self, root: Root) -> list[Question]:
        """The questions of LLaVA's JSONL, or of `TextVQA_0.5.1_{split}.json` and the OCR file, or of the Hub's tables.

        The Hub's tables contain OCR tokens too.
        """
        folder = "test_images" if self.split == "test" else "train_images"
        rows = _read_hub(root, self.split, with_images=FILES.find(root, folder) is None)
        release = _read_release(root, self.split, rows)
        prompts = self._list_prompts(root, release, rows)
        find_image = FILES.find_images(root, folder, rows)
        annotations = {(a["image_id"], a["question"].lower()): a for a in release}
        questions, counts = [], Counter()
        for image_id, prompt, image in prompts:
            text = extract_question_before_ocr(prompt)
            if annotations and (image_id, text) not in annotations:
                raise UserError(
                    f"{LLAVA_FILE} asks '{text}' about image {image_id}, but TextVQA_0.5.1_{self.split}.json does not."
                )
            gold = annotations.get((image_id, text), {})
            name = f"{image_id}: {text}"
            counts[name] += 1  # for some images, the same question occurs twice
            questions.append(
                Question(
                    name if counts[name] == 1 else f"{name} #{counts[name]}",
                    image_id,
                    prompt if self.ocr else _build_prompt(prompt.split("\n")[0], []),
                    (find_image(image),),
                    gold.get("answers") or None,
                    extra={"question_id": gold.get("question_id")},
                )
            )
        return questions

    def _list_prompts(
        self, root: Root, release: list[dict[str, Any]], rows: list[dict[str, Any]]
    ) -> list[PromptRecord]:
        """LLaVA's prompts if its file exists, else prompts built from the release."""
        llava = FILES.find(root, LLAVA_FILE) if self.split == "val" else None
        if llava:
            return [PromptRecord(q["question_id"], q["text"], q["image"]) for q in read_jsonl(llava)]
        if not release:
            FILES.require(root, FILE.format(self.split), _name_tables(self.split))
        tokens = _read_ocr_tokens(root, self.split, rows) if self.ocr else {}
        return [
            PromptRecord(
                a["image_id"], _build_prompt(a["question"], tokens.get(a["image_id"], [])), f"{a['image_id']}.jpg"
            )
            for a in release
        ]

    def references(self, root: Root) -> list[Question]:
        """The questions with their right answers. The OCR file is not needed."""
        if not FILES.find(root, FILE.format(self.split)) and not FILES.find_tables(root, _name_tables(self.split)):
            FILES.require(root, FILE.format(self.split), _name_tables(self.split))
        return replace(self, ocr=False).questions(root)

    def key(self, record: Answer) -> str:
        """The image's id and the question in the prompt, because an answer has only the image's id."""
        return f"{record['question_id']}: {extract_question_before_ocr(record.get('prompt') or '')}"

    def read_official(self, path: Path, questions: list[Question]) -> OfficialAnswers | None:
        """EvalAI's form, [{"question_id", "answer"}] with the ids of the release and without prompts."""
        document = read_json_if_whole(path)
        if not isinstance(document, list) or any(not isinstance(raw, dict) or "prompt" in raw for raw in document):
            return None
        by_id = {str(question.extra["question_id"]): to_answer_fields(question) for question in questions}
        unknown = {"prompt": "\n"}  # the prompt of no question
        records = [{**raw, **by_id.get(str(raw.get("question_id")), unknown)} for raw in document]
        return OfficialAnswers(records, questions) if any(r["prompt"] != "\n" for r in records) else None

    def parse(self, text: str, question: Question) -> str:
        """The module's `normalize`."""
        return normalize(text)

    def score(self, text: str, question: Question) -> float:
        """The module's `score`."""
        return score(text, question.answer)

    def evaluate(self, root: Root, pairs: list[Pair]) -> dict[str, Any]:
        """The mean accuracy over the answers. As in the official code, repeated ones count, and missing ones do not."""
        answered = drop_missing(pairs)
        with_ocr = any(OCR in (record.get("prompt") or "") for _, record in answered)
        metric = f"TextVQA ({'OCR' if with_ocr else 'no OCR'})"
        if any(question.answer is None for question, _ in answered):
            items = [build_item(q, record["text"], normalize(record["text"]), None) for q, record in answered]
            upload = [
                {"question_id": question.extra["question_id"], "answer": item["parsed"]}
                for (question, _), item in zip(answered, items, strict=True)
            ]
            files = {"textvqa_upload.json": upload}
            return build_result(None, f"{metric} test: upload to EvalAI", {}, items, files=files)
        items = self.score_answered(answered)
        accuracy = average(item["score"] for item in items)
        return build_result(100 * accuracy, metric, {"samples": len(items), "accuracy": accuracy}, items)
