"""The embedded default dataset, made on first use: `path: stamps:TIER/PART`.

TIER is tiny, small or full, PART captions, instructions or validation (pretrain and reading have other parts).
Pictures lie in the cache beside them.
"""

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tinyllava.config import DataSpec
from tinyllava.console import messages
from tinyllava.data.cache import locked
from tinyllava.data.sources import Source, llava_json
from tinyllava.errors import UserError

SEED = 0  # one dataset for everybody, so that scores compare


def matches(path: str) -> bool:
    return path.startswith("stamps:")


def read(spec: DataSpec, cache_dir: Path) -> Source:
    from tinyllava.data.stamps import TIERS, trained_parts

    name, _, part = spec.path.removeprefix("stamps:").partition("/")
    if name not in TIERS:
        raise UserError(f"unknown data {spec.path}. Expected stamps:TIER/PART with {_either(TIERS)}.")
    if part not in (parts := trained_parts(name)):
        raise UserError(f"unknown data {spec.path}. The parts of stamps:{name} are {', '.join(parts)}.")
    folder = prepared(name, cache_dir)
    local = spec.model_copy(update={"path": str(folder / f"{part}.json"), "images": [str(folder)]})
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
