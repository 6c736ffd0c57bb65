"""MME: 2,374 yes/no questions, two per image, in ten perception and four cognition tasks.

    tinyllava eval CHECKPOINT --tasks mme --data ROOT

The published number is the perception sum (at most 2000). The authors send the images on request: see
github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation.

Rules: `eval_tool/calculation.py` there (dd29509) and LLaVA's `convert_answer_to_mme.py`.
Deviation: tabs and line breaks in an answer become spaces. The official tool fails on them.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval import benchmarks
from tinyllava.eval.benchmarks import (
    SHORT_ANSWER,
    Answer,
    OfficialAnswers,
    Pair,
    Question,
    Root,
    ScoredItem,
    Sums,
    build_result,
    drop_missing,
    to_answer_fields,
)
from tinyllava.eval.benchmarks._files import read_jsonl, read_text_file
from tinyllava.eval.benchmarks._layouts import DataFiles

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
LLAVA_FILE = "llava_mme.jsonl"
RELEASE = "MME_Benchmark_release_version"
HUB = "data/test-*.parquet"
YES_OR_NO = "Please answer yes or no."
FILES = DataFiles("mme", folder="MME")


def _read_release(release: Path) -> Iterable[Question]:
    """Read the release. A category has X.jpg beside X.txt, or X.jpg in images/ and X.txt in questions_answers_YN/."""
    for folder in sorted(path for path in release.iterdir() if path.is_dir()):
        nested = (folder / "images").is_dir()
        images = folder / "images" if nested else folder
        paths = {path.stem: path for path in sorted(images.iterdir()) if path.suffix not in (".txt", "")}
        for file in sorted((folder / "questions_answers_YN" if nested else folder).glob("*.txt")):
            image = paths.get(file.stem, images / f"{file.stem}.jpg")
            qid = image.relative_to(release).as_posix()
            for line in read_text_file(file).split("\n"):
                if not line.strip():
                    continue
                question, tab, answer = line.strip().partition("\t")
                if not tab:
                    raise UserError(f"{file}: expected `question<tab>Yes|No`, found {line!r}.")
                yield _build_question(qid, question, str(image), answer, folder.name)


def _read_hub(root: Root) -> Iterable[Question]:
    columns = ("question_id", "question", "answer", "category")
    for row in FILES.read_rows(root, [HUB], columns, name=lambda row: row["question_id"]):
        yield _build_question(row["question_id"], row["question"], row["image"], row["answer"], row["category"])


def _build_question(qid: str, question: str, image: str, answer: str, category: str) -> Question:
    text = f"{question.replace(YES_OR_NO, '').strip()}\n{SHORT_ANSWER}"
    extra = {"question": question, "file": f"{PurePosixPath(qid).stem}.txt"}
    return Question(build_key({"question_id": qid, "prompt": text}), qid, text, (image,), answer, category, extra=extra)


def build_key(record: Answer) -> str:
    """The key of a question or an answer: the image's path and the prompt without its last sentence.

    The question_id alone is not enough: it is the path of the image, which two questions share.
    """
    category, _, path = str(record["question_id"]).partition("/")
    prompt = (record.get("prompt") or "").replace(SHORT_ANSWER, "").replace(YES_OR_NO, "").strip()
    return f"{category}/{PurePosixPath(path).name.split('.')[0]}: {prompt}"


def parse(text: str) -> str:
    """yes, no or other, by the first four characters in lower case: "Not sure" and "snow" are no, "eyes" is yes."""
    start = re.sub(r"[\t\r\n]", " ", text).lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score_task(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Score one task from its (gold, answer) pairs in file order, in which every two belong to one image.

    acc is the share of right answers ("other" is wrong), and acc_plus the share of images with two right answers.
    score = 100 acc + 100 acc_plus. As in the official tool, TP, FN, TN, FP, precision and recall ignore "other".
    """
    golds = [gold.lower() for gold, _ in pairs]
    parsed = [parse(answer) for _, answer in pairs]
    if not pairs or len(pairs) % 2 or set(golds) - {"yes", "no"}:
        raise UserError(
            f"MME: expected pairs of yes/no questions, found {len(pairs)} with the answers {sorted(set(golds))}."
        )
    both = list(zip(golds, parsed, strict=True))
    tp, fn = both.count(("yes", "yes")), both.count(("yes", "no"))
    tn, fp = both.count(("no", "no")), both.count(("no", "yes"))
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
        "other_num": parsed.count("other"),
        "acc": acc,
        "acc_plus": acc_plus,
        "score": 100 * acc + 100 * acc_plus,
    }


def aggregate(items: Iterable[ScoredItem]) -> dict[str, Any]:
    """Compute perception, cognition and each task's scores. An image counts if both of its questions are answered."""
    tasks: dict[str, list[tuple[str, str]]] = {}
    for (category, _), group in _group_by_image(items).items():
        if len(group) % 2 == 0:
            tasks.setdefault(category, []).extend((item["gold"], item["answer"]) for item in group)
    scores = {name: score_task(tasks[name]) for name in [*PERCEPTION, *COGNITION] if name in tasks}

    def total(names: Iterable[str]) -> float:
        return sum(scores[name]["score"] for name in names if name in scores)

    return {"perception": total(PERCEPTION), "cognition": total(COGNITION), "tasks": scores}


def _group_by_image(items: Iterable[ScoredItem]) -> dict[tuple[str, str], list[ScoredItem]]:
    groups: dict[tuple[str, str], list[ScoredItem]] = {}
    for item in items:
        groups.setdefault((item["category"], item["image"]), []).append(item)
    return groups


def mark_pairs(items: Iterable[ScoredItem]) -> None:
    """Set `both` in each item: whether both questions on its image are right; None if one has no answer."""
    for group in _group_by_image(items).values():
        for item in group:
            item["both"] = float(all(member["score"] for member in group)) if len(group) % 2 == 0 else None


def format_eval_tool_files(items: Iterable[ScoredItem]) -> dict[str, str]:
    """Format the official tool's input files, `CATEGORY.txt`, with image, question, gold and answer in each line."""
    files: dict[str, str] = {}
    for item in items:
        answer = re.sub(r"[\t\r\n]", " ", item["answer"])
        line = "\t".join((item["file"], item["question"], item["gold"], answer))
        files[f"{item['category']}.txt"] = files.get(f"{item['category']}.txt", "") + line + "\n"
    return files


def _identify(category: str, file: str, question: str) -> tuple[str, str, str]:
    """What a line of the official tool's files says about a question. Some tools write X.jpg, others X.txt."""
    return category, PurePosixPath(file).stem, " ".join(question.split())


class Benchmark(benchmarks.Benchmark):
    """MME by the official tool's rules; the score is the perception sum."""

    title = "MME"
    scorer = "MME eval_tool dd29509"
    folder = FILES.folder
    has_options = True
    is_mean = False

    def questions(self, root: Root) -> list[Question]:
        """The questions of LLaVA's `llava_mme.jsonl`; without it, of the release's folders or the Hub's tables.

        The right answers and the images are always those of the release or of the Hub's tables.
        """
        release = FILES.find(root, RELEASE)
        official = {question.id: question for question in (_read_release(release) if release else _read_hub(root))}
        if not official:
            FILES.require(root, RELEASE, HUB)
        llava = FILES.find(root, LLAVA_FILE)
        if not llava:
            return list(official.values())
        questions = []
        for q in read_jsonl(llava):
            name = build_key({"question_id": q["question_id"], "prompt": q["text"]})
            if name not in official:
                raise UserError(f"{llava} asks {name!r}, but {release or HUB} has no such question.")
            questions.append(replace(official[name], question_id=q["question_id"], text=q["text"]))
        return questions

    def read_official(self, path: Path, questions: list[Question]) -> OfficialAnswers | None:
        """The folder of the official tool: CATEGORY.txt with lines `image, question, right answer, answer` (tabs)."""
        files = sorted(path.glob("*.txt"))
        by_line = {_identify(q.category, q.extra["file"], q.extra["question"]): q for q in questions}
        records = []
        for file in files:
            for number, line in enumerate(read_text_file(file).rstrip("\n").split("\n"), start=1):
                cells = line.split("\t")
                question = by_line.get(_identify(file.stem, *cells[:2])) if len(cells) == 4 else None
                if question is None or question.answer.lower() != cells[2].strip().lower():
                    raise UserError(
                        f"{file}, line {number}: expected image, question, right answer and answer of a question of"
                        f" {file.stem}, with tabs between them; found {line[:120]!r}."
                    )
                records.append({**to_answer_fields(question), "text": cells[3]})
        return OfficialAnswers(records, questions) if files else None

    def choose_from(self, question: Question) -> tuple[str, ...]:
        """Yes and No."""
        return ("Yes", "No")

    def key(self, record: Answer) -> str:
        """The module's `build_key`."""
        return build_key(record)

    def parse(self, text: str, question: Question) -> str:
        """The module's `parse`."""
        return parse(text)

    def score(self, text: str, question: Question) -> float:
        """1 if the answer is right."""
        return float(parse(text) == question.answer.lower())

    def evaluate(self, root: Root, pairs: list[Pair]) -> dict[str, Any]:
        """The perception sum (the score), the cognition sum, and the official tool's input files."""
        items = self.score_answered(pairs)
        extras = [question.extra for question, _ in drop_missing(pairs)]
        for item, extra in zip(items, extras, strict=True):
            item |= {"question": extra["question"], "file": extra["file"]}
        mark_pairs(items)
        metrics = aggregate(items)
        scored = sum(task in metrics["tasks"] for task in PERCEPTION)
        metric = "MME perception"
        if scored < len(PERCEPTION):
            metric += f" ({scored} of {len(PERCEPTION)} tasks)"
        files = {f"mme_eval_tool/{name}": text for name, text in format_eval_tool_files(items).items()}
        unparsed = sum(item["parsed"] == "other" for item in items)
        return build_result(metrics["perception"], metric, metrics, items, unparsed, files)

    def tally(self, item: ScoredItem) -> Sums:
        """Count, for each perception task, the questions, the right answers, and those on images with both right."""
        if item["category"] not in PERCEPTION or item["both"] is None:
            return {}
        task = item["category"]
        return {f"{task} n": 1, f"{task} right": item["score"], f"{task} both": item["both"]}

    def headline(self, sums: Sums) -> float:
        """The perception sum."""
        shares = [
            (sums.get(f"{task} {what}", 0), sums[f"{task} n"])
            for task in PERCEPTION
            for what in ("right", "both")
            if sums.get(f"{task} n")
        ]
        return sum(100 * right / count for right, count in shares)
