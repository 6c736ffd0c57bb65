"""Stamps: the held-out test of the embedded dataset, which says per category what a small model has learned to see.

    tinyllava eval runs/quickstart --tasks stamps                    # the tier it was trained on
    tinyllava eval CHECKPOINT --tasks stamps --data stamps:small     # or a folder with test.jsonl

Answers are a word or two and must be the right ones, but for case, a period at the end and an article before: the exact
and choice metrics of `custom.py`, which scores tests of your own in the same form.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Question, custom
from tinyllava.eval.benchmarks._files import find, need

TITLE = "Stamps"
FOLDER = "stamps"
SCORER = "tinyllava stamps 1"
MAX_NEW_TOKENS = 32
BLIND = True  # a score here means little without what the model guesses from the question alone

FILE = "test.jsonl"
TIERS = ("tiny", "small", "full")


def locate(root: str | Path | None, trained_on: Iterable[str] = ()) -> Path:
    """The folder of test.jsonl: `root`'s, else the tier named in `root` or in the data that the model was trained on.

    A tier is composed on first use, the same on every machine. Raises UserError when nothing names one, or when `root`
    names one without a test.
    """
    named = [re.match(rf"stamps:({'|'.join(TIERS)})\b", str(name)) for name in [root or "", *trained_on]]
    if str(root).startswith("stamps:") and not named[0]:
        raise UserError(f"{root} has no test. Give --data stamps:{TIERS[0]} (or {', '.join(TIERS[1:])}).")
    if root and not named[0] and find(root, FOLDER, FILE):
        return need(root, FOLDER, FILE).parent
    tier = next((match[1] for match in named if match), None)
    if tier is None:
        raise UserError(
            f"stamps: which test? There is no {FILE} in {root or 'a data folder'}, and the model was not trained on"
            f" stamps. Give --data stamps:{TIERS[0]} (or {', '.join(TIERS[1:])})."
        )
    from tinyllava.data.cache import cache_root
    from tinyllava.data.sources.stamps import prepared

    return prepared(tier, cache_root())


def questions(root: str | Path) -> list[Question]:
    """The questions of `test.jsonl`; pictures lie beside it."""
    path = need(root, FOLDER, FILE, hint="A tier's is made by `--data stamps:tiny`.")
    found = custom.read(path)
    for question in found:
        question.extra["metric"] = "choice" if question.options else "exact"
    return found


def evaluate(root: str | Path, pairs: list[tuple[Question, dict[str, Any] | None]]) -> dict[str, Any]:
    """Percent right of all questions, and the accuracy of each category. A missing answer is left out."""
    return custom.evaluate(root, pairs) | {"metric": "accuracy over all questions"}
