"""MME: 2,374 yes/no questions, two a picture, in ten perception and four cognition tasks.

    tinyllava eval CHECKPOINT --tasks mme --data ROOT

The published number is the perception sum (at most 2000). Pictures are given on request: see
github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation.

Rules: `eval_tool/calculation.py` there (dd29509) and LLaVA's `convert_answer_to_mme.py`.
Deviation: tabs and line breaks in an answer, on which the official tool breaks, become spaces.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import SHORT_ANSWER, Question, item, result
from tinyllava.eval.benchmarks import _hub as hub
from tinyllava.eval.benchmarks._files import find, need, read_jsonl, remedy

TITLE = "MME"
FOLDER = "MME"
SCORER = "MME eval_tool dd29509"
MAX_NEW_TOKENS = 128

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
LLAVA_FILE = "llava_mme.jsonl"
RELEASE = "MME_Benchmark_release_version"
HUB = "data/test-*.parquet"
YES_OR_NO = "Please answer yes or no."


def questions(root: str | Path) -> list[Question]:
    """The questions of LLaVA's `llava_mme.jsonl`, else of the release's own folders or the Hub's copy of them; the
    answers and pictures are always of the latter."""
    release = find(root, FOLDER, RELEASE)
    found = _release_questions(release) if release else _hub_questions(root)
    official = {question.id: question for question in found}
    if not official:
        need(root, FOLDER, RELEASE, HUB, hint=remedy("mme"))
    llava = find(root, FOLDER, LLAVA_FILE)
    if not llava:
        return list(official.values())
    found = []
    for q in read_jsonl(llava):
        name = key({"question_id": q["question_id"], "prompt": q["text"]})
        if name not in official:
            raise UserError(f"{llava} asks {name!r}, and {release or HUB} has no such question.")
        found.append(replace(official[name], question_id=q["question_id"], text=q["text"]))
    return found


def _release_questions(release: Path) -> Iterable[Question]:
    """Each category keeps X.jpg beside X.txt, or the ones in images/ and the others in questions_answers_YN/."""
    for folder in sorted(path for path in release.iterdir() if path.is_dir()):
        nested = (folder / "images").is_dir()
        images = folder / "images" if nested else folder
        pictures = {path.stem: path for path in sorted(images.iterdir()) if path.suffix not in (".txt", "")}
        for file in sorted((folder / "questions_answers_YN" if nested else folder).glob("*.txt")):
            picture = pictures.get(file.stem, images / f"{file.stem}.jpg")
            qid = picture.relative_to(release).as_posix()
            for line in file.read_text(encoding="utf-8").split("\n"):
                if not line.strip():
                    continue
                question, tab, answer = line.strip().partition("\t")
                if not tab:
                    raise UserError(f"{file}: expected `question<tab>Yes|No`, found {line!r}.")
                yield _question(qid, question, str(picture), answer, folder.name)


def _hub_questions(root: str | Path) -> Iterable[Question]:
    columns = ("question_id", "question", "answer", "category")
    for row in hub.rows(hub.tables(root, FOLDER, HUB), *columns, name=lambda row: row["question_id"]):
        yield _question(row["question_id"], row["question"], row["image"], row["answer"], row["category"])


def _question(qid: str, question: str, picture: str, answer: str, category: str) -> Question:
    text = f"{question.replace(YES_OR_NO, '').strip()}\n{SHORT_ANSWER}"
    extra = {"question": question, "file": f"{PurePosixPath(qid).stem}.txt"}
    return Question(key({"question_id": qid, "prompt": text}), qid, text, (picture,), answer, category, extra=extra)


def key(record: dict[str, Any]) -> str:
    """Two questions share a picture, whose path is the question_id: the prompt less its last sentence tells which."""
    category, _, path = str(record["question_id"]).partition("/")
    prompt = (record.get("prompt") or "").replace(SHORT_ANSWER, "").replace(YES_OR_NO, "").strip()
    return f"{category}/{PurePosixPath(path).name.split('.')[0]}: {prompt}"


def choose_from(question: Question) -> tuple[str, ...]:
    """The two answers."""
    return ("Yes", "No")


def parse(text: str) -> str:
    """yes, no or other, by the first four characters in lower case: "Not sure", "none", "snow" are no, "eyes" yes."""
    start = re.sub(r"[\t\r\n]", " ", text).lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def task_score(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """One task's scores from (gold, answer) in file order, every two of one picture.

    acc counts questions ("other" is wrong), acc_plus pictures with both right; score = 100 acc + 100 acc_plus.
    The confusion counts, precision and recall leave "other" out, as does the official tool.
    """
    golds = [gold.lower() for gold, _ in pairs]
    said = [parse(answer) for _, answer in pairs]
    if not pairs or len(pairs) % 2 or set(golds) - {"yes", "no"}:
        raise UserError(
            f"MME: expected pairs of yes/no questions, found {len(pairs)} with the answers {sorted(set(golds))}."
        )
    both = list(zip(golds, said, strict=True))
    tp, fn, tn, fp = (both.count(k) for k in (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes")))
    right = [gold == answer for gold, answer in both]
    acc = sum(right) / len(right)
    acc_plus = sum(map(all, zip(right[::2], right[1::2], strict=True))) / (len(right) // 2)
    return {
        "TP": tp,
        "FN": fn,
        "TN": tn,
        "FP": fp,
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
        "other_num": said.count("other"),
        "acc": acc,
        "acc_plus": acc_plus,
        "score": 100 * acc + 100 * acc_plus,
    }


def aggregate(items: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """perception, cognition and every task's scores; a picture counts when both of its questions are answered."""
    pictures: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in items:
        pictures.setdefault((one["category"], one["image"]), []).append(one)
    tasks: dict[str, list[tuple[str, str]]] = {}
    for (category, _), two in pictures.items():
        if len(two) % 2 == 0:
            tasks.setdefault(category, []).extend((one["gold"], one["answer"]) for one in two)
    scores = {name: task_score(tasks[name]) for name in [*PERCEPTION, *COGNITION] if name in tasks}

    def total(names: Iterable[str]) -> float:
        return sum(scores[name]["score"] for name in names if name in scores)

    return {"perception": total(PERCEPTION), "cognition": total(COGNITION), "tasks": scores}


def tally(item: dict[str, Any]) -> dict[str, float]:
    """Of each perception task the questions, the right ones, and those on pictures with both right."""
    if item["category"] not in PERCEPTION or item["both"] is None:
        return {}
    task = item["category"]
    return {f"{task} n": 1, f"{task} right": item["score"], f"{task} both": item["both"]}


def headline(sums: dict[str, float]) -> float:
    """The perception sum."""
    shares = [
        (sums.get(f"{task} {what}", 0), sums[f"{task} n"])
        for task in PERCEPTION
        for what in ("right", "both")
        if sums.get(f"{task} n")
    ]
    return sum(100 * part / whole for part, whole in shares)


def mark_pairs(items: Iterable[dict[str, Any]]) -> None:
    """Write into each item's `both` whether both questions on its picture are right (None: one has no answer)."""
    pictures: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in items:
        pictures.setdefault((one["category"], one["image"]), []).append(one)
    for two in pictures.values():
        for one in two:
            one["both"] = float(all(other["score"] for other in two)) if len(two) % 2 == 0 else None


def eval_tool_files(items: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The text of the official tool's input files, `CATEGORY.txt`: picture, question, gold and answer in a line."""
    files: dict[str, str] = {}
    for one in items:
        answer = re.sub(r"[\t\r\n]", " ", one["answer"])
        line = "\t".join((one["file"], one["question"], one["gold"], answer))
        files[f"{one['category']}.txt"] = files.get(f"{one['category']}.txt", "") + line + "\n"
    return files


def evaluate(root: str | Path, pairs: list[tuple[Question, dict[str, Any] | None]]) -> dict[str, Any]:
    """Perception (the score) and cognition sums; the official tool's input files come along."""
    items = []
    for question, record in pairs:
        if record is not None:
            said = parse(record["text"])
            more = {"question": question.extra["question"], "file": question.extra["file"]}
            items.append(item(question, record["text"], said, float(said == question.answer.lower()), **more))
    mark_pairs(items)
    metrics = aggregate(items)
    present = sum(task in metrics["tasks"] for task in PERCEPTION)
    metric = (
        "MME perception" if present == len(PERCEPTION) else f"MME perception ({present} of {len(PERCEPTION)} tasks)"
    )
    files = {f"mme_eval_tool/{name}": text for name, text in eval_tool_files(items).items()}
    unparsed = sum(one["parsed"] == "other" for one in items)
    return result(metrics["perception"], metric, metrics, items, unparsed, files)
