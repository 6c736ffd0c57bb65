"""How sure a score is: 95 % bootstrap intervals.

Drawn are pictures, each with all questions on it, since those are not independent (so MME's pairs stay pairs too).
A score is a function of sums over items (`tally` and `headline` of `tinyllava.eval.benchmarks`), so a draw is one
product of how often each picture was drawn with the table of its sums.

Shapes: P pictures, K sums, D draws.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinyllava.eval import benchmarks

DRAWS = 2000
SEED = 0
LEVEL = (2.5, 97.5)  # percent

Item = Mapping[str, Any]
Interval = list[float]  # [low, high]


class Sums:
    """What each picture adds to the sums that a benchmark's score is made of."""

    def __init__(self, benchmark: Any, items: Sequence[Item], pictures: Sequence[str]) -> None:
        """`pictures` names each item's picture."""
        tally = getattr(benchmark, "tally", benchmarks.tally)
        self.headline = getattr(benchmark, "headline", benchmarks.headline)
        self.names, self.table = _table([tally(item) for item in items], pictures)

    def score(self) -> float:
        """The score of all items."""
        return self.headline(dict(zip(self.names, self.table.sum(0).tolist(), strict=True)))

    def scores(self, drawn: np.ndarray) -> np.ndarray:
        """[D] scores of drawn sums [D, K]."""
        return np.array([self.headline(dict(zip(self.names, row, strict=True))) for row in drawn.tolist()])


def intervals(benchmark: Any, items: Sequence[Item]) -> tuple[Interval | None, dict[str, Interval]]:
    """The interval of the score, in its scale, and of each category's mean (0..1).

    None and {} for fewer than two pictures, and where a server scores.
    """
    items = [item for item in items if item["score"] is not None]
    pictures = [picture(item) for item in items]
    if len(set(pictures)) < 2:
        return None, {}
    sums = Sums(benchmark, items, pictures)
    shares = [{(item["category"], "score"): item["score"], (item["category"], "n"): 1} for item in items]
    names, table = _table(shares, pictures)
    drawn = resample(np.hstack([sums.table, table]), DRAWS)
    own, rest = drawn[:, : len(sums.names)], dict(zip(names, drawn[:, len(sums.names) :].T, strict=True))
    categories = {}
    for category in dict.fromkeys(item["category"] for item in items):
        n = rest[category, "n"]
        categories[category] = bounds(rest[category, "score"][n > 0] / n[n > 0])
    return bounds(sums.scores(own)), categories


def resample(table: np.ndarray, draws: int) -> np.ndarray:
    """[D, K]: the sums over as many pictures as there are, drawn with replacement; the same on every machine."""
    rng, count = np.random.default_rng(SEED), len(table)
    drawn = np.empty((draws, table.shape[1]))
    for row in drawn:
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        row[:] = times.astype(float) @ table
    return drawn


def bounds(values: np.ndarray) -> Interval:
    """The middle 95 % of drawn values."""
    return [float(value) for value in np.percentile(values, LEVEL)]


def picture(item: Item) -> str:
    """What an item is drawn with: its picture, or itself when it has none."""
    return item["image"] or f"no picture: {item['id']}"


def _table(tallies: Sequence[Mapping[Any, float]], pictures: Sequence[str]) -> tuple[list[Any], np.ndarray]:
    """The names of all counts, and the sums [P, K] over each picture's items."""
    rows = {name: row for row, name in enumerate(dict.fromkeys(pictures))}
    columns = {name: column for column, name in enumerate(dict.fromkeys(name for tally in tallies for name in tally))}
    table = np.zeros((len(rows), len(columns)))
    cells = [(rows[name], columns[count]) for name, tally in zip(pictures, tallies, strict=True) for count in tally]
    at = np.array(cells, dtype=int).reshape(-1, 2)
    np.add.at(table, (at[:, 0], at[:, 1]), [value for tally in tallies for value in tally.values()])
    return list(columns), table
