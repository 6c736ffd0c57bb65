"""What `tinyllava train` and `tinyllava eval` do with benchmarks: ask and score a checkpoint, compare two."""

from pathlib import Path
from typing import Any

from tinyllava.console import messages, output
from tinyllava.errors import UserError
from tinyllava.eval.tasks import Task, find_tasks


def split(tasks: str) -> list[str]:
    """Names with commas between."""
    return [task.strip() for task in tasks.split(",") if task.strip()]


def checked(tasks: list[str], root: str | None, judge: str | None = None) -> list[Task]:
    """The tasks of these names: before training, not after.

    Raises UserError for an unknown one, for one whose data are nowhere, and for a judge of nothing.
    """
    found = find_tasks(tasks)
    for task in found:
        if root is None and task.needs_data():
            raise UserError(
                f"{task.name} needs its data: give --data ROOT. (`tinyllava list benchmarks` says what each is.)"
            )
    if judge is not None and not any(task.is_judged() for task in found):
        raise UserError(f"--judge is for mmvet: {', '.join(tasks)} is scored by rules alone.")
    return found


def ask_and_score(
    checkpoint: str | Path,
    tasks: list[Task],
    root: str | None,
    folder: Path,
    judge: str | None = None,
    lacking: dict[str, Any] | None = None,
    together: bool = False,
) -> None:
    """Ask and score a checkpoint, and show the table and where the sample answers lie.

    together: with all processes that torchrun has started, of which the first scores and shows.
    """
    from tinyllava.eval.run import evaluate
    from tinyllava.eval.table import print_scores
    from tinyllava.eval.workers import Workers
    from tinyllava.infer import Session

    session = Session.load(checkpoint, **(lacking or {}))
    workers = Workers.from_environment() if together else Workers()
    results = evaluate(session, tasks, root, folder, judge=judge, workers=workers)
    if not workers.is_main:
        return
    print_scores(results)
    for task in tasks:
        page = folder / "eval" / task.name / "samples.html"
        output.print(f"{task.name}: sample answers with their pictures in {page}", highlight=False, soft_wrap=True)


def print_comparison(a: Path, b: Path, tasks: list[str]) -> None:
    """One sentence a task that both have scored: whether they differ, and by how much."""
    from tinyllava.eval.compare import compare

    with messages.status("comparing"):
        found = compare(a, b, [task.name for task in find_tasks(tasks)])
    for one in found:
        output.print(one.sentence(str(a), str(b)), highlight=False, markup=False, soft_wrap=True)
