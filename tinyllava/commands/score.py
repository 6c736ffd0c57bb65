"""`tinyllava score TASK --data ROOT --answers FILE`: score an answers file by official rules."""

from pathlib import Path
from typing import Any

from tinyllava.commands.evaluate import check_tasks
from tinyllava.console import messages, output
from tinyllava.eval.answers import read_conditions
from tinyllava.eval.judging import set_judge
from tinyllava.eval.results import RESULTS, build_entry, load_results, save_details, save_entry, strip_placeholder
from tinyllava.eval.score import score_answers
from tinyllava.eval.table import print_scores
from tinyllava.eval.tasks import Task


def score_and_show(
    name: str, root: str | None, answers: Path, folder: Path | None, allow_partial: bool, judge: str | None
) -> None:
    """Score `answers`, write the results to `folder` (default: ANSWERS.scores), and print the table."""
    (task,) = check_tasks([name], root, judge)
    folder = folder or answers.with_name(f"{answers.stem}.scores")
    with messages.status(f"scoring {task.title}"):
        results = score_file(task, root, answers, folder, allow_partial, judge)
    print_scores(results, [task.name])
    output.print(f"{folder / RESULTS}", highlight=False, markup=False, soft_wrap=True)


def score_file(
    task: Task, root: str | None, answers: Path, folder: Path, allow_partial: bool, judge: str | None
) -> dict[str, Any]:
    """Score `answers`; returns the new content of `folder`/results.json.

    If `tinyllava eval` wrote the answers and they are still in their folder, the results also name the conditions under
    which they were made.
    """
    load_results(folder / RESULTS)
    data_root, details = task.locate(root), folder / "eval" / task.name
    result = score_answers(set_judge(task, judge, details), data_root, answers, allow_partial=allow_partial)
    prompts = {name: strip_placeholder(prompt) for name, prompt in result["prompts"].items()}
    conditions = read_conditions(answers.parent)
    entry = build_entry(
        task,
        result,
        prompts,
        None,
        n=result["counts"]["questions"],
        counts=result["counts"],
        decoding=conditions.get("decoding"),
        data={"root": str(data_root), **result["data"]},
        answers=str(answers),
    )
    save_details(details, result, prompts)
    # The entry has these three already: what remains describes the model, which must be the same for all entries.
    model_conditions = {name: conditions[name] for name in conditions if name not in ("data", "prompts", "decoding")}
    return save_entry(folder, model_conditions, task, entry)
