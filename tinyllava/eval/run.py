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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllava.data.cache import digest
from tinyllava.data.images import absent
from tinyllava.errors import UserError
from tinyllava.eval import results as record
from tinyllava.eval.answers import Answers, claim
from tinyllava.eval.ask import ask, sample_of, spread
from tinyllava.eval.benchmarks import fingerprint as data_fingerprint
from tinyllava.eval.judging import judging
from tinyllava.eval.page import sample_page
from tinyllava.eval.tasks import Task, find_task
from tinyllava.eval.workers import Workers
from tinyllava.infer import Session


def evaluate(
    session: Session,
    tasks: Sequence[str | Task],
    root: str | Path | None,
    output: Path,
    batch_size: int | None = None,
    limit: int | None = None,
    blind: bool = False,
    progress: bool = True,
    judge: str | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Ask and score `tasks`, whose data lie under `root`; returns what `output`/results.json then holds.

    Everything is looked for before anything is asked. `limit`: at most so many questions a task, evenly spread.
    `blind`: all of them once more without pictures, as stamps does anyway. `judge`: see `tinyllava.eval.judging`.
    `workers`: all these processes ask, and the first scores and returns. Other tasks stay, if of this checkpoint.
    Raises UserError for an unknown task, a layout or a picture not there.
    """
    output = Path(output)
    record.load(output / record.RESULTS)
    found = [find_task(task) if isinstance(task, str) else task for task in tasks]
    jobs = [Job(task, root, session, output, limit, blind, judge) for task in found]
    made, results, workers = made_with(session), {}, workers or Workers()
    for job in jobs:
        entry = job.run(session, made, batch_size, progress, workers)
        if entry is None:
            continue
        results = record.save(output, made, job.task, entry, checkpoint=str(session.path))
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
        self,
        task: Task,
        root: str | Path | None,
        session: Session,
        output: Path,
        limit: int | None,
        blind: bool,
        judge: str | None = None,
    ) -> None:
        """Find and read everything that asking needs."""
        self.task, self.folder = task, output / "eval" / task.name
        trained_on = [source["path"] for source in session.record.get("run", {}).get("data", [])]
        self.root, self.blind = task.place(root, trained_on), blind or getattr(task.benchmark, "BLIND", False)
        self.judging = judging(task, judge, self.folder)
        everything = task.questions(self.root)
        if not all(question.text for question in everything):
            raise UserError(f"{task.name}: the files in {self.root} hold answers, and no prompts to ask.")
        self.asked = digest(*sorted((question.id, question.text) for question in everything))
        self.data = {
            "root": str(self.root),
            "fingerprint": data_fingerprint(everything),
            "questions": len(everything),
        }
        self.questions = spread(everything, limit)
        pictures = dict.fromkeys(image for question in self.questions for image in question.images)
        missing = [error for picture in pictures if (error := absent(picture, ()))]
        if missing:
            count = f"{len(missing)} of its {len(pictures)}"
            raise UserError(f"{task.name}: {count} pictures cannot be read: {missing[0]}.")
        self.prompts = {question.id: record.bare(question.text) for question in self.questions}

    def run(
        self, session: Session, made: dict[str, Any], batch_size: int | None, progress: bool, workers: Workers
    ) -> dict[str, Any] | None:
        """Ask what is not answered yet, score, write the task's files; returns its entry in results.json.

        None in all processes but the first.
        """
        decoding = {"temperature": 0.0, "max_new_tokens": self.task.benchmark.MAX_NEW_TOKENS}
        data, choice = self.data["fingerprint"], self.task.choice
        if choice:
            decoding["options"] = choice.name
        if workers.is_main:
            claim(self.folder, {**made, "data": data, "prompts": self.asked, "decoding": decoding})
        options = {"progress": progress, "batch_size": batch_size, "choice": choice, "workers": workers}
        options |= {"temperature": 0.0, "max_new_tokens": decoding["max_new_tokens"]}
        answers = ask(session, self.questions, self.folder / "answers.jsonl", title=self.task.title, **options)
        unseen = None
        if self.blind:
            options |= {"blind": True, "title": f"{self.task.title}, blind"}
            unseen = ask(session, self.questions, self.folder / "answers_blind.jsonl", **options)
        if not workers.is_main:
            return None
        result, unseen = self.score(answers), self.score(unseen) if unseen is not None else None
        entry = record.entry(
            self.task,
            result,
            self.prompts,
            unseen,
            n=len(self.questions),
            decoding=decoding,
            prompt=session.template.prompt(sample_of(self.questions[0]), session.tokenizer)["text"],
            data=self.data,
        )
        record.save_details(self.folder, result, self.prompts)
        sample_page({**entry, "items": result["items"]}, self.questions, answers, self.folder / "samples.html")
        return entry

    def score(self, answers: Answers) -> dict[str, Any]:
        """The benchmark's own result."""
        pairs = [(question, answers[question.id]) for question in self.questions]
        return self.task.evaluate(self.root, pairs, **self.judging)
