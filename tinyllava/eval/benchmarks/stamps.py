"""Stamps: the held-out test of the embedded dataset. It shows for each category what a small model has learned to see.

    tinyllava eval runs/quickstart --tasks stamps                    # the tier that the model was trained on
    tinyllava eval CHECKPOINT --tasks stamps --data stamps:small     # or a folder with test.jsonl

Answers have one or two words. An answer is right if it equals the right answer, ignoring case, a final period and a
leading article. These are the metrics exact and choice of `custom.py`, which scores a user's own questions.
"""

import re
from collections.abc import Iterable
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Pair, Question, Root, custom
from tinyllava.eval.benchmarks._layouts import DataFiles

FILES = DataFiles("stamps", folder="stamps")
FILE = "test.jsonl"
TIERS = ("tiny", "small", "full")
HINT = f"Give --data stamps:{TIERS[0]} (or {', '.join(TIERS[1:])})."


class Benchmark(custom.Benchmark):
    """The test of a tier."""

    title = "Stamps"
    scorer = "tinyllava stamps 2"
    folder = FILES.folder
    max_new_tokens = 32
    asks_blind = True  # a score means little here if we do not know what the model guesses without the image
    fills_categories = True  # recipes and docs read the categories of this test at the top of results.json
    has_options = False

    def locate(self, root: Root | None, trained_on: Iterable[str] = ()) -> Root:
        """Find the folder of test.jsonl: in `root`, or of the tier that `root` or the training data names.

        A tier is composed on first use, the same on every machine. Raises UserError if nothing names a tier, or if the
        tier in `root` has no test.
        """
        named = [re.match(rf"stamps:({'|'.join(TIERS)})\b", str(name)) for name in [root or "", *trained_on]]
        if str(root).startswith("stamps:") and not named[0]:
            raise UserError(f"{root} contains no stamps test. {HINT}")
        if root and not named[0] and FILES.find(root, FILE):
            return FILES.require(root, FILE).parent
        tier = next((match[1] for match in named if match), None)
        if tier is None:
            raise UserError(
                f"stamps: no test found. There is no {FILE} in {root or 'a data folder'}, and the model was not trained"
                f" on stamps. {HINT}"
            )
        # Imported here, because all other methods are pure Python and need no image library.
        from tinyllava.cache import find_cache_root
        from tinyllava.data.sources.stamps import compose_tier

        return compose_tier(tier, find_cache_root())

    def questions(self, root: Root) -> list[Question]:
        """The questions of `test.jsonl`. Image paths are relative to it."""
        path = FILES.require(root, FILE, hint="`--data stamps:tiny` composes the test of a tier.")
        questions = custom.read_questions(path)
        for question in questions:
            question.extra["metric"] = "choice" if question.options else "exact"
        return questions

    def evaluate(self, root: Root, pairs: list[Pair]) -> dict[str, Any]:
        """The accuracy over all questions in percent, and that of each category. Missing answers are left out."""
        return super().evaluate(root, pairs) | {"metric": "accuracy over all questions"}
