"""Whether two models differ on the same questions: `tinyllava eval --compare runs/a runs/b`.

Scores are compared question by question. The interval of their difference is a paired bootstrap over pictures. p is
McNemar's exact test where answers are right or wrong and the score is their mean; it takes questions for independent,
so that for a difference the interval has to leave out 0 as well. For all other scores p is the bootstrap's.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyllava.errors import UserError
from tinyllava.eval import benchmarks
from tinyllava.eval.benchmarks._files import read_jsonl
from tinyllava.eval.intervals import Sums, bounds, picture, resample
from tinyllava.eval.results import ITEMS, RESULTS, load
from tinyllava.eval.tasks import SUFFIX, Task, find_task
from tinyllava.factory import Factory

DRAWS = 10_000
ALPHA = 0.05


class Comparison(NamedTuple):
    """A task's scores, the difference of B from A in points, its 95 % interval, and p of there being none."""

    title: str
    scores: tuple[float, float]
    difference: float
    interval: list[float]
    p: float
    test: str

    @property
    def differs(self) -> bool:
        """Whether the test and the interval both say so."""
        return self.p < ALPHA and not self.interval[0] <= 0 <= self.interval[1]

    def sentence(self, a: str, b: str) -> str:
        """What was found, in one plain sentence."""
        low, high = self.interval
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.2g}"
        figures = (
            f"{self.scores[1]:.1f} against {self.scores[0]:.1f}, {self.difference:+.1f} points"
            f" (95 % interval {low:+.1f} to {high:+.1f}, {p}, {self.test})"
        )
        if not self.differs:
            return f"{self.title}: {b} and {a} cannot be told apart: {figures}."
        return f"{self.title}: {b} is {'better' if self.difference > 0 else 'worse'} than {a}: {figures}."


def compare(a: str | Path, b: str | Path, tasks: Sequence[str] | None = None) -> list[Comparison]:
    """Compare two runs, or directories that `tinyllava score` wrote, on the `tasks` that both have scored.

    Raises UserError when questions, prompts, data or scorers of a task are not the same, and says which.
    """
    entries = _entries(Path(a)), _entries(Path(b))
    common = [name for name in entries[0] if name in entries[1]]
    for name in tasks or []:
        if name not in common:
            raise UserError(f"{name} is not in both: {a} has {_list(entries[0])}, {b} has {_list(entries[1])}.")
    if not common:
        raise UserError(f"nothing to compare: {a} has {_list(entries[0])}, {b} has {_list(entries[1])}.")
    found = []
    for name in tasks or common:
        pair = entries[0][name], entries[1][name]
        for what in ("scorer", "metric"):
            if pair[0][what] != pair[1][what]:
                raise UserError(f"{name}: not the same {what}: '{pair[0][what]}' in {a}, '{pair[1][what]}' in {b}.")
        if pair[0]["score"] is None:
            raise UserError(f"{name} was not scored here ({pair[0]['metric']}), so there is nothing to compare.")
        items = _items(Path(a), name), _items(Path(b), name)
        found.append(compare_items(_task(name, pair[0]).benchmark, pair[0]["title"], *matched(name, *items)))
    return found


def compare_items(benchmark: Any, title: str, a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Comparison:
    """Compare scored items that answer the same questions, in the same order."""
    pictures = [picture(item) for item in a]
    sums = Sums(benchmark, a, pictures), Sums(benchmark, b, pictures)
    scores = sums[0].score(), sums[1].score()
    drawn = resample(np.hstack([sums[0].table, sums[1].table]), DRAWS)
    width = len(sums[0].names)
    differences = sums[1].scores(drawn[:, width:]) - sums[0].scores(drawn[:, :width])
    p, test = _bootstrap_p(differences), f"paired bootstrap over {len(set(pictures)):,} pictures"
    tally = getattr(benchmark, "tally", benchmarks.tally)
    counted = [(one["score"], other["score"]) for one, other in zip(a, b, strict=True) if tally(one)]
    if not hasattr(benchmark, "headline") and all(score in (0, 1) for two in counted for score in two):
        only = Counter(counted)
        p = mcnemar(only[1, 0], only[0, 1])
        test = f"exact McNemar: {only[1, 0]:,} only the first has right, {only[0, 1]:,} only the second"
    return Comparison(title, scores, scores[1] - scores[0], bounds(differences), p, test)


def mcnemar(only_a: int, only_b: int) -> float:
    """The two-sided exact p that as few of the questions which only one has right fall to one side (McNemar 1947)."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    if not n:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(log - n * math.log(2)) for log in logs))


def _bootstrap_p(differences: np.ndarray) -> float:
    """Twice the share of draws on the rarer side of 0; at least what that many draws can tell."""
    share = min(np.mean(differences <= 0), np.mean(differences >= 0))
    return float(min(1.0, max(2 * share, 1 / (len(differences) + 1))))


def matched(
    name: str, a: list[dict[str, Any]], b: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The items of both in one order. Raises UserError unless they are the same questions, answers and prompts."""
    first, second = _numbered(a), _numbered(b)
    if first.keys() != second.keys():
        lone = [[key[0] for key in one if key not in other] for one, other in ((first, second), (second, first))]
        example = next(f"'{ids[0]}'" for ids in lone if ids)
        raise UserError(
            f"{name}: not the same questions: {len(lone[0])} are only in the first, {len(lone[1])} only in the second"
            f" (such as {example}), of {len(first)} and {len(second)}."
        )
    for what, of in (
        ("data: the right answer", lambda item: item["gold"]),
        ("data: the picture", lambda item: Path(item["image"]).name),
        ("prompts: the prompt", lambda item: item["prompt"]),
    ):
        other = [key for key in first if of(first[key]) != of(second[key]) and _known(of, first[key], second[key])]
        if other:
            values = [str(of(items[other[0]]))[:100] for items in (first, second)]
            raise UserError(
                f"{name}: not the same {what} to {len(other)} of {len(first)} questions differs; to '{other[0][0]}'"
                f" {values[0]!r} and {values[1]!r}."
            )
    return list(first.values()), [second[key] for key in first]


def _known(of: Any, one: dict[str, Any], other: dict[str, Any]) -> bool:
    # Not every answers file tells prompts, and not every layout pictures.
    return of(one) != "" and of(other) != ""


def _numbered(items: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Items by id, and by their number among those that repeat it."""
    seen: Counter[str] = Counter()
    found = {}
    for item in items:
        seen[item["id"]] += 1
        found[item["id"], seen[item["id"]]] = item
    return found


def _entries(place: Path) -> dict[str, Any]:
    path = place if place.name == RESULTS else place / RESULTS
    if not path.is_file():
        raise UserError(f"there is no {path}. Compare runs or directories that `tinyllava eval` or `score` wrote.")
    return load(path)["tasks"]


def _items(place: Path, name: str) -> list[dict[str, Any]]:
    path = (place.parent if place.name == RESULTS else place) / "eval" / name / ITEMS
    if not path.is_file():
        raise UserError(f"there is no {path}, which {RESULTS} goes with. Score the answers again.")
    return read_jsonl(path)


def _task(name: str, entry: dict[str, Any]) -> Task:
    custom = entry["data"]["root"].endswith(SUFFIX)
    return Task(name, Factory("benchmarks").get("custom")) if custom else find_task(name)


def _list(entries: dict[str, Any]) -> str:
    return ", ".join(entries) or "no scores"
