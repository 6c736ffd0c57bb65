"""Evaluate a checkpoint for `tinyllava train` and `tinyllava eval`, or compare two results."""

from pathlib import Path
from typing import Any

from tinyllava.console import messages, output
from tinyllava.errors import UserError
from tinyllava.eval.tasks import Task, find_tasks


def split_names(tasks: str) -> list[str]:
    """Split names separated by commas into a list."""
    return [task.strip() for task in tasks.split(",") if task.strip()]


def check_tasks(names: list[str], root: str | None, judge: str | None = None) -> list[Task]:
    """Find the tasks of these names and check them, before a model is loaded or trained.

    Raises UserError for an unknown task, for one that requires --data, and for a judge without a task to grade.
    """
    tasks = find_tasks(names)
    for task in tasks:
        task.check_root(root)
    if judge is not None and not any(task.benchmark.is_judged for task in tasks):
        raise UserError(f"--judge is for mmvet: {', '.join(names)} is scored by rules. Leave out --judge.")
    return tasks


def ask_and_score(
    checkpoint: str | Path,
    tasks: list[Task],
    root: str | None,
    folder: Path,
    judge: str | None = None,
    lacking: dict[str, Any] | None = None,
    together: bool = False,
) -> None:
    """Evaluate a checkpoint, and print the table of scores and the paths of the sample pages.

    lacking: keywords of `Session.load` for what is missing in the checkpoint. together: use all processes that torchrun
    has started; only the first one scores and prints.
    """
    from tinyllava.eval.run import evaluate_tasks
    from tinyllava.eval.table import print_scores
    from tinyllava.eval.workers import Workers
    from tinyllava.infer import Session

    session = Session.load(checkpoint, **(lacking or {}))
    workers = Workers.from_environment() if together else Workers()
    results = evaluate_tasks(session, tasks, root, folder, judge=judge, workers=workers)
    if not workers.is_main:
        return
    print_scores(results)
    for task in tasks:
        page = folder / "eval" / task.name / "samples.html"
        output.print(
            f"{task.name}: sample answers with their images in {page}", highlight=False, markup=False, soft_wrap=True
        )


def print_comparison(a: Path, b: Path, names: list[str]) -> None:
    """Print for each task that both runs have scored whether they differ, and by how much."""
    from tinyllava.eval.compare import compare_runs

    with messages.status("comparing"):
        comparisons = compare_runs(a, b, [task.name for task in find_tasks(names)])
    for comparison in comparisons:
        output.print(comparison.to_sentence(str(a), str(b)), highlight=False, markup=False, soft_wrap=True)
