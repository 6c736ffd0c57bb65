"""Ask a checkpoint a benchmark's questions, and score its answers: `tinyllava eval CHECKPOINT --tasks stamps,pope`.

    OUTPUT/results.json                    the scores, and how they were made
    OUTPUT/eval/TASK/answers.jsonl         one line a question, written as they come: after a kill, start it again
                     answers_blind.jsonl   the same questions, asked without their pictures
                     items.jsonl           what was read out of each answer, and its score
                     samples.html          some of them with their pictures
                     ...                   metrics.json, made_with.json, files for servers and official tools

Blind: the pictures and their `<image>` are taken out of the prompt, so that the model answers from the question and
from what it knows about answers. (A grey picture would be one it never saw in training, and test its confusion.)
Majority: always the answer that is most often right in the category. What an accuracy is worth lies above both.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tinyllava.console import output as stdout
from tinyllava.data.cache import digest
from tinyllava.data.images import absent
from tinyllava.errors import UserError
from tinyllava.eval.ask import Answers, ask, claim, sample_of, spread, write
from tinyllava.eval.benchmarks import mean
from tinyllava.eval.page import percent, sample_page
from tinyllava.factory import Factory
from tinyllava.infer import Session
from tinyllava.train.record import versions

RESULTS = "results.json"
LARGE = 200  # entries: a metric with more (a score for each question) is in metrics.json alone


def evaluate(
    session: Session,
    tasks: Sequence[str],
    root: str | Path | None,
    output: Path,
    batch_size: int | None = None,
    limit: int | None = None,
    blind: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask and score `tasks`, whose data lie under `root`; returns what `output`/results.json then holds.

    Everything is looked for before anything is asked. `limit`: at most so many questions a task, evenly spread.
    `blind`: all of them once more without pictures, as stamps does anyway. Other tasks stay, if of this checkpoint.
    Raises UserError for an unknown task, and for a layout or a picture that is not there.
    """
    jobs = [Job(task, root, session, Path(output), limit, blind) for task in tasks]
    path = Path(output) / RESULTS
    made = made_with(session)
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    results = before if before.get("made_with") == made else {"categories": {}, "tasks": {}}
    results |= {"made_with": made, "checkpoint": str(session.path), "versions": versions()}
    for job in jobs:
        results["tasks"][job.task] = entry = job.run(session, made, batch_size, progress)
        if job.task == "stamps":
            results["categories"] = entry["categories"]
        write(path, json.dumps(results, indent=2) + "\n")
    return results


def made_with(session: Session) -> dict[str, Any]:
    """What decides a model's answers, but for questions and decoding."""
    config, template = session.model.config.text_config, session.template
    return {
        "checkpoint": fingerprint(session.path),
        "template": {"name": template.name, "compat": template.compat, "source": digest(template.source)},
        "dtype": str(session.model.dtype).removeprefix("torch."),
        "attention": config._attn_implementation,
    }


def fingerprint(directory: Path) -> str:
    """A hash of what a checkpoint computes: weights, config, tokenizer and image processor, wherever it lies."""
    hasher = hashlib.sha256()
    names = ("config.json", "tokenizer.json", "processor_config.json", "preprocessor_config.json")
    for path in sorted(directory.iterdir()):
        if path.suffix in (".safetensors", ".model") or path.name in names:
            hasher.update(path.name.encode())
            with path.open("rb") as file:
                hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()[:16]


class Job:
    """One task: its questions, and the folder that its answers go to."""

    def __init__(
        self, task: str, root: str | Path | None, session: Session, output: Path, limit: int | None, blind: bool
    ) -> None:
        """Find and read everything that asking needs."""
        self.task, self.benchmark, self.folder = task, Factory("benchmarks").get(task), output / "eval" / task
        if hasattr(self.benchmark, "locate"):
            trained_on = [source["path"] for source in session.record.get("run", {}).get("data", [])]
            root = self.benchmark.locate(root, trained_on)
        if root is None:
            raise UserError(f"{task} needs its data: give --data ROOT, a folder with {self.benchmark.FOLDER}/ in it.")
        self.root, self.blind = root, blind or getattr(self.benchmark, "BLIND", False)
        everything = self.benchmark.questions(root)
        if not all(question.text for question in everything):
            raise UserError(f"{task}: the files in {root} hold answers, and no prompts to ask.")
        names = [(q.id, q.text, [Path(image).name for image in q.images], q.answer) for q in everything]
        self.data = {"root": str(root), "fingerprint": digest(*names), "questions": len(everything)}
        self.questions = spread(everything, limit)
        pictures = dict.fromkeys(image for question in self.questions for image in question.images)
        missing = [error for picture in pictures if (error := absent(picture, ()))]
        if missing:
            raise UserError(f"{task}: {len(missing)} of its {len(pictures)} pictures cannot be read: {missing[0]}.")

    def run(self, session: Session, made: dict[str, Any], batch_size: int | None, progress: bool) -> dict[str, Any]:
        """Ask what is not answered yet, score, write the task's files; returns its entry in results.json."""
        benchmark = self.benchmark
        decoding = {"temperature": 0.0, "max_new_tokens": benchmark.MAX_NEW_TOKENS}
        claim(self.folder, {**made, "data": self.data["fingerprint"], "decoding": decoding})
        options = {"progress": progress, "batch_size": batch_size, **decoding}
        answers = ask(session, self.questions, self.folder / "answers.jsonl", title=benchmark.TITLE, **options)
        result, unseen = self.score(answers), None
        if self.blind:
            options |= {"blind": True, "title": f"{benchmark.TITLE}, blind"}
            unseen = self.score(ask(session, self.questions, self.folder / "answers_blind.jsonl", **options))
        entry = {
            "title": benchmark.TITLE,
            "metric": result["metric"],
            "score": result["score"],
            "blind": unseen["score"] if unseen else None,
            "n": len(self.questions),
            "unparsed": result["unparsed"],
            "categories": categories(result["items"], unseen["items"] if unseen else None),
            "metrics": {name: value for name, value in result["metrics"].items() if not is_large(value)},
            "scorer": benchmark.SCORER,
            "decoding": decoding,
            "prompt": session.template.prompt(sample_of(self.questions[0]), session.tokenizer)["text"],
            "data": self.data,
            "files": str(self.folder),
        }
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in result["items"]]
        write(self.folder / "items.jsonl", "".join(lines))
        write(self.folder / "metrics.json", json.dumps(result["metrics"], indent=2) + "\n")
        for name, content in result["files"].items():
            write(self.folder / name, content if isinstance(content, str) else json.dumps(content))
        sample_page({**entry, "items": result["items"]}, self.questions, answers, self.folder / "samples.html")
        return entry

    def score(self, answers: Answers) -> dict[str, Any]:
        """The benchmark's own result."""
        return self.benchmark.evaluate(self.root, [(question, answers[question.id]) for question in self.questions])


def categories(items: list[dict[str, Any]], unseen: list[dict[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """{accuracy, blind, majority, n} of each category, in the order of the test; none for answers that were not scored.

    blind is None where it was not asked, majority where answers are no single text or number.
    """
    groups = _by_category(items)
    blind = _by_category(unseen or [])
    table = {}
    for name, group in groups.items():
        golds = [item["gold"] for item in group]
        plain = all(isinstance(gold, str | int) for gold in golds)
        table[name] = {
            "accuracy": mean(item["score"] for item in group),
            "blind": mean(item["score"] for item in blind[name]) if name in blind else None,
            "majority": Counter(golds).most_common(1)[0][1] / len(golds) if plain else None,
            "n": len(group),
        }
    return table


def _by_category(items: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        if item["score"] is not None:
            groups.setdefault(item["category"] or "all", []).append(item)
    return groups


def is_large(value: Any) -> bool:
    """Whether a metric is as long as the benchmark."""
    return isinstance(value, dict | list) and len(value) > LARGE


def print_scores(results: dict[str, Any], console: Console = stdout) -> None:
    """The score table of results.json: each task and its categories beside blind and majority.

    Green: above both baselines by more than two standard errors; yellow: not.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("accuracy", "blind", "majority", "n"):
        table.add_column(name, justify="right")
    for entry in results["tasks"].values():
        score, blind = (f"{entry[name]:.1f}" if entry[name] is not None else "" for name in ("score", "blind"))
        table.add_row(f"[bold]{entry['title']}[/] [dim]{entry['metric']}[/]", score, blind, "", f"{entry['n']:,}")
        for name, row in entry["categories"].items():
            style = "green" if stands_out(row) else "yellow"
            numbers = [percent(row[key]) for key in ("accuracy", "blind", "majority")]
            table.add_row(f"  {name}", f"[{style}]{numbers[0]}[/]", *numbers[1:], f"{row['n']:,}")
    console.print(table)


def stands_out(row: dict[str, Any]) -> bool:
    """Whether an accuracy is above blind and majority by more than two standard errors of their difference."""
    seen, best = row["accuracy"], max(row["blind"] or 0.0, row["majority"] or 0.0)
    return seen - best > 2 * ((seen * (1 - seen) + best * (1 - best)) / row["n"]) ** 0.5
