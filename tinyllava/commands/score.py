"""`tinyllava score TASK --data ROOT --answers FILE`: any answers file, ours or the original's, by official rules."""

from pathlib import Path
from typing import Any

from tinyllava.commands.evaluate import checked
from tinyllava.console import messages, output
from tinyllava.eval import results as record
from tinyllava.eval.answers import MADE_WITH
from tinyllava.eval.benchmarks._files import read_json
from tinyllava.eval.judging import judging
from tinyllava.eval.score import score_answers
from tinyllava.eval.table import print_scores
from tinyllava.eval.tasks import Task


def score_and_show(
    name: str, root: str | None, answers: Path, folder: Path | None, allow_partial: bool, judge: str | None
) -> None:
    """Score `answers` into `folder`, by default ANSWERS.scores, and show the table."""
    (task,) = checked([name], root, judge)
    folder = folder or answers.with_name(f"{answers.stem}.scores")
    with messages.status(f"scoring {task.title}"):
        results = score_file(task, root, answers, folder, allow_partial, judge)
    print_scores(results, [task.name])
    output.print(f"{folder / record.RESULTS}", highlight=False, soft_wrap=True)


def score_file(
    task: Task, root: str | None, answers: Path, folder: Path, allow_partial: bool, judge: str | None
) -> dict[str, Any]:
    """Score `answers`; returns what `folder`/results.json then holds.

    What made the answers is known if they lie where `tinyllava eval` wrote them.
    """
    record.load(folder / record.RESULTS)
    place, own = task.place(root), folder / "eval" / task.name
    result = score_answers(task, place, answers, allow_partial=allow_partial, **judging(task, judge, own))
    prompts = {name: record.bare(prompt) for name, prompt in result["prompts"].items()}
    made = read_json(answers.parent / MADE_WITH) if (answers.parent / MADE_WITH).is_file() else {}
    entry = record.entry(
        task,
        result,
        prompts,
        None,
        n=result["counts"]["questions"],
        counts=result["counts"],
        decoding=made.get("decoding"),
        data={"root": str(place), **result["data"]},
        answers=str(answers),
    )
    record.save_details(own, result, prompts)
    model = {name: value for name, value in made.items() if name not in ("data", "prompts", "decoding")}
    return record.save(folder, model, task, entry)
