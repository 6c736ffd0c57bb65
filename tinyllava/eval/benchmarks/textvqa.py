"""TextVQA 0.5.1 val: 5,000 questions about text in OpenImages pictures, by default with OCR tokens in the prompt.

    tinyllava eval CHECKPOINT --tasks textvqa,textvqa-no-ocr --data ROOT

LLaVA's and TinyLLaVA's published numbers have Rosetta's OCR tokens in the prompt (worth ten points and more), so the
metric is named "TextVQA (OCR)" and the one without "TextVQA (no OCR)"; they do not compare.

Rules: `eval_textvqa.py` and `m4c_evaluator.py` of TinyLLaVA 53f12c7 (the same as in LLaVA c121f04).
"""

import re
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import SHORT_ANSWER, Question, item, mean, result, variants
from tinyllava.eval.benchmarks import _hub as hub
from tinyllava.eval.benchmarks._files import field_of, find, need, read_json, read_jsonl, remedy
from tinyllava.eval.benchmarks._vqa import leave_one_out, normalize_m4c

TITLE = "TextVQA"
FOLDER = "textvqa"
SCORER = "m4c_evaluator, TinyLLaVA 53f12c7"
MAX_NEW_TOKENS = 128
COUNT_DUPLICATES = True  # the official mean is over the lines of the answers file

OCR = "Reference OCR token: "
LLAVA_FILE = "llava_textvqa_val_v051_ocr.jsonl"
FILE = "TextVQA_0.5.1_{}.json"
OCR_FILE = "TextVQA_Rosetta_OCR_v0.2_{}.json"

from_short_name = variants({"val": {"split": "val"}, "test": {"split": "test"}, "no-ocr": {"ocr": False}})


def questions(root: str | Path, ocr: bool = True, split: str = "val") -> list[Question]:
    """The questions of `split` (val, test), of LLaVA's JSONL, or of `TextVQA_0.5.1_{split}.json` and the OCR file, or
    of the Hub's copy, which has the OCR tokens too."""
    folder = find(root, FOLDER, "test_images" if split == "test" else "train_images")
    copies = _hub_rows(root, split, with_pictures=folder is None)
    release, pictures = _release(root, split, copies), {} if folder else hub.pictures(copies)
    llava = find(root, FOLDER, LLAVA_FILE) if split == "val" else None
    if llava:
        asked = [(q["question_id"], q["text"], q["image"]) for q in read_jsonl(llava)]
    else:
        if not release:
            need(root, FOLDER, FILE.format(split), _hub_files(split), hint=remedy("textvqa"))
        tokens = _ocr_tokens(root, split, copies) if ocr else {}
        asked = [
            (a["image_id"], _prompt(a["question"], tokens.get(a["image_id"], [])), f"{a['image_id']}.jpg")
            for a in release
        ]
    folder = folder or Path(root) / FOLDER / ("test_images" if split == "test" else "train_images")
    annotations = {(a["image_id"], a["question"].lower()): a for a in release}
    found, seen = [], {}
    for image_id, prompt, image in asked:
        question = _question(prompt)
        if annotations and (image_id, question) not in annotations:
            raise UserError(
                f"{LLAVA_FILE} asks '{question}' of image {image_id}, which TextVQA_0.5.1_{split}.json lacks."
            )
        gold = annotations.get((image_id, question), {})
        name = f"{image_id}: {question}"
        seen[name] = seen.get(name, 0) + 1  # some pictures are asked the same question twice
        found.append(
            Question(
                name if seen[name] == 1 else f"{name} #{seen[name]}",
                image_id,
                prompt if ocr else _prompt(prompt.split("\n")[0], []),
                (pictures.get(image, str(folder / image)),),
                gold.get("answers") or None,
                extra={"question_id": gold.get("question_id")},
            )
        )
    return found


def references(root: str | Path, split: str = "val") -> list[Question]:
    """What scoring needs: the questions with their answers, whether or not the OCR file is there."""
    if not find(root, FOLDER, FILE.format(split)) and not hub.tables(root, FOLDER, _hub_files(split)):
        need(root, FOLDER, FILE.format(split), _hub_files(split), hint=remedy("textvqa"))
    return questions(root, ocr=False, split=split)


def _hub_files(split: str) -> str:
    return f"data/{'validation' if split == 'val' else split}-*.parquet"


def _hub_rows(root: str | Path, split: str, with_pictures: bool) -> list[dict[str, Any]]:
    columns = ("image_id", "question_id", "question", "answers", "ocr_tokens")
    name = (lambda row: f"{row['image_id']}.jpg") if with_pictures else None
    return hub.rows(hub.tables(root, FOLDER, _hub_files(split)), *columns, name=name)


def _release(root: str | Path, split: str, copies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The official records; none where neither their file nor the Hub's copy is."""
    path = find(root, FOLDER, FILE.format(split))
    return field_of(read_json(path), "data", path) if path else copies


def _ocr_tokens(root: str | Path, split: str, copies: list[dict[str, Any]]) -> dict[str, list[str]]:
    name = OCR_FILE.format(split)
    if copies and not find(root, FOLDER, name):
        return {row["image_id"]: row["ocr_tokens"] for row in copies}
    path = need(
        root, FOLDER, name, hint=f"The prompts hold OCR tokens: add {LLAVA_FILE} or {name}, or ask textvqa-no-ocr."
    )
    return {r["image_id"]: r["ocr_tokens"] for r in field_of(read_json(path), "data", path)}


def _prompt(question: str, tokens: list[str]) -> str:
    # A line break in a token would break the official join of answers to questions.
    line = OCR + ", ".join(" ".join(token.split()) for token in tokens) + "\n" if tokens else ""
    return f"{question}\n{line}{SHORT_ANSWER}"


def question_from_prompt(prompt: str) -> str:
    """The question in lower case, as the official join finds it in a prompt. UserError where that code gives up."""
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


def _question(prompt: str) -> str:
    """`question_from_prompt`, but also where an OCR token holds a line break, on which the official code gives up."""
    before, ocr, _ = prompt.partition(f"\n{OCR}")
    return before.lower() if ocr else question_from_prompt(prompt)


def key(record: dict[str, Any]) -> str:
    """Answers carry the image's id: the official join takes the question from the prompt."""
    return f"{record['question_id']}: {_question(record.get('prompt') or '')}"


def normalize(text: str) -> str:
    """EvalAI's (M4C's) normaliser, which differs from the VQA v2 scorer's in commas, question marks and `'s`."""
    return normalize_m4c(text)


def score(prediction: str, answers: list[str]) -> float:
    """Accuracy in 0..1 against exactly ten answers: leave-one-out as in VQAv2, but always normalised."""
    if len(answers) != 10:
        raise UserError(f"TextVQA scores against ten answers, found {len(answers)}.")
    return leave_one_out(normalize(prediction), [(normalize(answer), human) for human, answer in enumerate(answers)])


def evaluate(root: str | Path, pairs: list[tuple[Question, dict[str, Any] | None]]) -> dict[str, Any]:
    """Mean accuracy over the answers; missing ones are left out and repeated ones count again, as officially."""
    answered = [(question, record) for question, record in pairs if record is not None]
    with_ocr = any(OCR in (record.get("prompt") or "") for _, record in answered)
    metric = f"TextVQA ({'OCR' if with_ocr else 'no OCR'})"
    if any(question.answer is None for question, _ in answered):
        upload = [{"question_id": q.extra["question_id"], "answer": normalize(r["text"])} for q, r in answered]
        items = [item(q, r["text"], normalize(r["text"]), None) for q, r in answered]
        return result(None, f"{metric} test: upload to EvalAI", {}, items, files={"textvqa_upload.json": upload})
    items = [item(q, r["text"], normalize(r["text"]), score(r["text"], q.answer)) for q, r in answered]
    accuracy = mean(one["score"] for one in items)
    return result(100 * accuracy, metric, {"samples": len(items), "accuracy": accuracy}, items)
