"""`tinyllava train`: train the stages of a recipe, then evaluate the last one."""

import shlex
from pathlib import Path

from tinyllava.commands.engines import show_engines
from tinyllava.commands.evaluate import ask_and_score, check_tasks
from tinyllava.config import load_recipe
from tinyllava.console import is_main_process, output
from tinyllava.locks import lock_run


def train_and_score(
    recipe: str, overrides: list[str] | None, directory: Path | None, overwrite: bool, data: str | None
) -> None:
    """Train a recipe into `directory`, by default runs/RECIPE, and score its `eval` list.

    data: the directory of the benchmark data.
    """
    loaded, name = load_recipe(recipe, overrides), Path(recipe).stem
    tasks = check_tasks(loaded.eval, data)
    from tinyllava.commands.follow import follow_stage
    from tinyllava.train import stage

    directory = directory or Path("runs") / name
    with lock_run(directory):  # also while it is scored
        final = stage.run(loaded, name, directory, overwrite=overwrite, follow=follow_stage)
        if not is_main_process():
            return
        if tasks:
            ask_and_score(final, tasks, data, directory)
    output.print(
        f"\nchat     tinyllava chat {shlex.quote(str(directory))}", highlight=False, markup=False, soft_wrap=True
    )
    output.print(f"weights  {final}", highlight=False, markup=False, soft_wrap=True)
    show_engines(final, output)
