"""Evaluate a checkpoint: ask the questions of benchmarks and score the answers.

    tinyllava eval CHECKPOINT --tasks stamps,pope

It writes these files:

    OUTPUT/results.json                    the scores, and the conditions they were made under
    OUTPUT/eval/TASK/answers.jsonl         one line per question, appended at once: run it again to resume after a kill
                     answers_blind.jsonl   the same questions, asked without the images
                     items.jsonl           each parsed answer, and its score
                     samples.html          some questions and answers with their images
                     ...                   metrics.json, made_with.json, files for servers and official tools

Blind baseline: the model is asked without the images and without their `<image>` placeholders. It can use only the
question and what it knows about answers. (A grey image instead would be unlike all training images, so it would test
how the model reacts to a strange image.) Majority baseline: always the most frequent right answer of the category. Only
an accuracy above both baselines shows that the model uses the image.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllava.cache import digest
from tinyllava.checkpoint import legacy_peft
from tinyllava.data.images import find_file_fault
from tinyllava.data.references import is_file_reference
from tinyllava.errors import UserError
from tinyllava.eval.answers import Answers, claim_folder
from tinyllava.eval.ask import ask_questions, pick_evenly, to_sample
from tinyllava.eval.benchmarks import Question, Root, hash_questions
from tinyllava.eval.judging import set_judge
from tinyllava.eval.page import write_sample_page
from tinyllava.eval.results import RESULTS, build_entry, load_results, save_details, save_entry, strip_placeholder
from tinyllava.eval.tasks import Task, find_task
from tinyllava.eval.workers import Workers
from tinyllava.infer import Session


def evaluate_tasks(
    session: Session,
    tasks: Sequence[str | Task],
    root: Root | None,
    output: Path,
    batch_size: int | None = None,
    limit: int | None = None,
    blind: bool = False,
    progress: bool = True,
    judge: str | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Ask and score `tasks`, whose data are under `root`; returns the new content of `output`/results.json.

    All tasks are checked before the first question is asked. `limit`: the largest number of questions per task.
    `blind`: also ask everything without the images, as stamps always does. `judge`: see `tinyllava.eval.judging`.
    `workers`: all these processes ask; only the first one scores, and the others return {}. Entries of other tasks stay
    if they belong to this checkpoint. Raises UserError for an unknown task, and for missing data files or images.
    """
    output = Path(output)
    load_results(output / RESULTS)  # raises before the work if the file there is not ours
    tasks = [find_task(task) if isinstance(task, str) else task for task in tasks]
    jobs = [Job(task, root, session, output, limit, blind, judge) for task in tasks]
    conditions, results, workers = describe_conditions(session), {}, workers or Workers()
    for job in jobs:
        entry = job.ask_and_score(session, conditions, batch_size, progress, workers)
        if entry is not None:
            results = save_entry(output, conditions, job.task, entry, checkpoint=str(session.path))
    return results


def describe_conditions(session: Session) -> dict[str, Any]:
    """Everything that decides a model's answers, except for questions and decoding."""
    config, template = session.model.config.text_config, session.template
    return {
        "checkpoint": hash_checkpoint(session.path),
        "template": {"name": template.name, "compat": template.compat, "source": digest(template.source)},
        "dtype": str(session.model.dtype).removeprefix("torch."),
        "attention": config._attn_implementation,
    }


def hash_checkpoint(directory: Path) -> str:
    """A hash of a checkpoint's weights, config, tokenizer and image processor. Its path does not change it."""
    hasher = hashlib.sha256()
    if legacy_peft.stands_alone(directory):
        hasher.update(hash_checkpoint(legacy_peft.find_base(directory)).encode())
    names = ("config.json", "tokenizer.json", "processor_config.json", "preprocessor_config.json")
    for path in sorted(directory.iterdir()):
        is_pickled = path.suffix == ".bin" and path.name.startswith(("pytorch_model", "adapter_model"))
        if path.suffix in (".safetensors", ".model") or path.name in names or is_pickled:
            hasher.update(path.name.encode())
            with path.open("rb") as file:
                hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()[:16]


class Job:
    """One task to run: its questions, and the folder for its answers."""

    def __init__(
        self,
        task: Task,
        root: Root | None,
        session: Session,
        output: Path,
        limit: int | None,
        blind: bool,
        judge: str | None = None,
    ) -> None:
        """Read the questions and check their images. Raises UserError if anything is missing."""
        self.folder = output / "eval" / task.name
        trained_on = [source["path"] for source in session.record.get("run", {}).get("data", [])]
        self.root, self.blind = task.locate(root, trained_on), blind or task.benchmark.asks_blind
        self.task = set_judge(task, judge, self.folder)
        questions = task.read_questions(self.root)
        if not questions:
            raise UserError(f"{task.name} has no questions: nothing was found in {self.root}. Check --data.")
        if not all(question.text for question in questions):
            raise UserError(f"{task.name}: the files in {self.root} have no prompts, so nothing can be asked.")
        self.prompts_hash = digest(*sorted((question.id, question.text) for question in questions))
        self.data = {"root": str(self.root), "fingerprint": hash_questions(questions), "questions": len(questions)}
        self.questions = pick_evenly(questions, limit)
        self.prompts = {question.id: strip_placeholder(question.text) for question in self.questions}
        check_images(task.name, self.questions)

    def ask_and_score(
        self, session: Session, conditions: dict[str, Any], batch_size: int | None, progress: bool, workers: Workers
    ) -> dict[str, Any] | None:
        """Ask the remaining questions, score all answers and write the task's files; returns its entry in results.json.

        Returns None in all processes except the first.
        """
        decoding = {"temperature": 0.0, "max_new_tokens": self.task.benchmark.max_new_tokens}
        options = {**decoding, "progress": progress, "batch_size": batch_size, "workers": workers}
        if self.task.choice:
            decoding["options"], options["choice"] = self.task.choice.name, self.task.choice
        if workers.is_main:
            asked = {"data": self.data["fingerprint"], "prompts": self.prompts_hash, "decoding": decoding}
            claim_folder(self.folder, {**conditions, **asked})
        path, title = self.folder / "answers.jsonl", self.task.title
        answers = ask_questions(session, self.questions, path, title=title, **options)
        blind_answers = None
        if self.blind:
            path = self.folder / "answers_blind.jsonl"
            title = f"{title}, without the images"
            blind_answers = ask_questions(session, self.questions, path, title=title, blind=True, **options)
        if not workers.is_main:
            return None
        result = self.score(answers)
        entry = build_entry(
            self.task,
            result,
            self.prompts,
            None if blind_answers is None else self.score(blind_answers),
            n=len(self.questions),
            decoding=decoding,
            prompt=session.template.encode_prompt(to_sample(self.questions[0]), session.tokenizer)["text"],
            data=self.data,
        )
        save_details(self.folder, result, self.prompts)
        page = self.folder / "samples.html"
        write_sample_page({**entry, "items": result["items"]}, self.questions, answers, page)
        return entry

    def score(self, answers: Answers) -> dict[str, Any]:
        """The result of the answers, as the benchmark's `evaluate` returns it."""
        return self.task.evaluate(self.root, [(question, answers[question.id]) for question in self.questions])


def check_images(name: str, questions: Sequence[Question]) -> None:
    """Raise UserError if images of the questions cannot be read. The error has their number and the first of them."""
    images = dict.fromkeys(image for question in questions for image in question.images)
    errors = [error for image in images if is_file_reference(image) and (error := find_file_fault(image, ()))]
    if errors:
        raise UserError(f"{name}: {len(errors)} of its {len(images)} images cannot be read: {errors[0]}.")
