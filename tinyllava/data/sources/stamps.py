"""The embedded default dataset, made on first use: `path: stamps:TIER/PART`.

TIER is tiny, small or full, PART captions, instructions or validation (pretrain and reading have other parts).
Pictures lie in the cache beside them.
"""

import re
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tinyllava.config import DataSpec
from tinyllava.console import messages
from tinyllava.data.cache import locked
from tinyllava.data.sources import Source, llava_json
from tinyllava.errors import UserError

TIERS = ("tiny", "small", "full", "pretrain", "reading")
PARTS = ("captions", "instructions", "validation", "lists", "questions", "texts", "words")
PATH = re.compile(rf"stamps:({'|'.join(TIERS)})/({'|'.join(PARTS)})")
SEED = 0  # one dataset for everybody, so that scores compare


def matches(path: str) -> bool:
    return path.startswith("stamps:")


def read(spec: DataSpec, cache_dir: Path) -> Source:
    named = PATH.fullmatch(spec.path)
    if not named:
        raise UserError(
            f"unknown data {spec.path}. Expected stamps:TIER/PART with {_either(TIERS)}, and {_either(PARTS)}."
        )
    folder = prepared(named[1], cache_dir)
    local = spec.model_copy(update={"path": str(folder / f"{named[2]}.json"), "images": [str(folder)]})
    source = llava_json.read(local, cache_dir)
    source.path = spec.path
    return source


def prepared(tier: str, cache_dir: Path) -> Path:
    """The folder of `tier` (images/, captions.json, ..., test.jsonl), composed now if this machine has not yet."""
    from tinyllava.data.stamps import prepare

    root = cache_dir / "stamps"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, transient=True, console=messages, disable=not messages.is_terminal)
    task = bar.add_task(f"Composing stamps:{tier}, once")

    def progress(done: int, total: int) -> None:
        bar.start()  # only now: a tier that is there already shows nothing
        bar.update(task, completed=done, total=total)

    with locked(root / tier):
        try:
            return prepare(root, tier, SEED, progress)
        finally:
            bar.stop()


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
