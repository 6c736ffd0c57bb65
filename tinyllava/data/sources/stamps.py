"""The embedded default dataset, which is composed when it is first used: `path: stamps:TIER/SUBSET`.

TIER is tiny, small or full; SUBSET is captions, instructions or validation. The tiers pretrain and reading have other
subsets. The images are in the cache beside the records.
"""

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import tinyllava.data.sources.llava_json as llava_json
from tinyllava.cache import mark_used
from tinyllava.config import DataSpec
from tinyllava.console import messages
from tinyllava.data.sources.source import Source
from tinyllava.errors import UserError

SEED = 0  # the same dataset for all users, so that scores can be compared


def matches(path: str) -> bool:
    """Whether `path` begins with `stamps:`."""
    return path.startswith("stamps:")


def read(spec: DataSpec, cache_dir: Path) -> Source:
    """The records of a subset, in LLaVA's format, and its images. Raises UserError for an unknown tier or subset."""
    from tinyllava.stamps import TIERS, list_training_subsets

    tier, _, subset = spec.path.removeprefix("stamps:").partition("/")
    if tier not in TIERS:
        raise UserError(f"unknown data {spec.path}. Expected stamps:TIER/SUBSET with {_join_names(TIERS)}.")
    if subset not in (subsets := list_training_subsets(tier)):
        raise UserError(f"unknown data {spec.path}. The subsets of stamps:{tier} are {', '.join(subsets)}.")
    folder = compose_tier(tier, cache_dir)
    local = spec.model_copy(update={"path": str(folder / f"{subset}.json"), "images": [str(folder)]})
    source = llava_json.read(local, cache_dir)
    source.path = spec.path
    return source


def compose_tier(tier: str, cache_dir: Path) -> Path:
    """The folder of `tier` (images/, captions.json, ..., test.jsonl), composed now if it is not there yet."""
    from tinyllava.stamps import prepare_tier

    root = cache_dir / "stamps"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, transient=True, console=messages, disable=not messages.is_terminal)
    task = bar.add_task(f"Composing stamps:{tier}, once")

    def progress(done: int, total: int) -> None:
        bar.start()  # only now, so that nothing is shown for a tier that exists
        bar.update(task, completed=done, total=total)

    try:
        folder = prepare_tier(root, tier, SEED, progress)
    finally:
        bar.stop()
    mark_used(folder)
    return folder


def _join_names(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
