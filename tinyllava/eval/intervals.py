"""95 % bootstrap intervals of scores.

An image is drawn with all its questions, because questions on one image are not independent. This also keeps MME's
pairs together. A score is a function of sums over items (`tally` and `headline` of a benchmark). So the sums of a draw
are one matrix product: how often each image was drawn, times the table of each image's sums.

Shapes: P images, K sums, D draws.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinyllava.eval.benchmarks import Benchmark, ScoredItem

DRAWS = 2000  # another seed then moves a bound by less than a tenth of a standard error
SEED = 0
LEVEL = (2.5, 97.5)  # percent

Interval = list[float]  # [low, high]


class SumTable:
    """What each image adds to the sums that a benchmark's score is made of."""

    def __init__(self, benchmark: Benchmark, items: Sequence[ScoredItem], images: Sequence[str]) -> None:
        """Add up the items. `images`: the name of each item's image."""
        self.benchmark = benchmark
        self.names, self.table = _sum_by_image([benchmark.tally(item) for item in items], images)

    def compute_score(self) -> float:
        """The score of all items."""
        return self.benchmark.headline(dict(zip(self.names, self.table.sum(0).tolist(), strict=True)))

    def compute_scores(self, drawn: np.ndarray) -> np.ndarray:
        """[D] scores of drawn sums [D, K]."""
        return np.array([self.benchmark.headline(dict(zip(self.names, row, strict=True))) for row in drawn.tolist()])


def compute_intervals(benchmark: Benchmark, items: Sequence[ScoredItem]) -> tuple[Interval | None, dict[str, Interval]]:
    """The interval of the score, in its scale, and of each category's mean (0..1).

    (None, {}) if there are fewer than two images, or if only a server knows the scores.
    """
    items = [item for item in items if item["score"] is not None]
    images = [identify_image(item) for item in items]
    if len(set(images)) < 2:
        return None, {}
    sums = SumTable(benchmark, items, images)
    shares = [{(item["category"], "score"): item["score"], (item["category"], "n"): 1} for item in items]
    names, table = _sum_by_image(shares, images)
    drawn = resample(np.hstack([sums.table, table]), DRAWS)
    columns = dict(zip(names, drawn[:, len(sums.names) :].T, strict=True))
    categories = {}
    for category in dict.fromkeys(item["category"] for item in items):
        n = columns[category, "n"]
        # A draw may hold no image of a rare category.
        categories[category] = compute_bounds(columns[category, "score"][n > 0] / n[n > 0])
    return compute_bounds(sums.compute_scores(drawn[:, : len(sums.names)])), categories


def resample(table: np.ndarray, draws: int) -> np.ndarray:
    """The sums [D, K] of D draws. Each draws P of the P images with replacement; the same on every machine."""
    rng, count = np.random.default_rng(SEED), len(table)
    drawn = np.empty((draws, table.shape[1]))
    for row in drawn:
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        row[:] = times.astype(float) @ table
    return drawn


def compute_bounds(values: np.ndarray) -> Interval:
    """The bounds of the middle 95 % of drawn values."""
    return [float(value) for value in np.percentile(values, LEVEL)]


def identify_image(item: ScoredItem) -> str:
    """The name of what is drawn: the item's image, or the item itself if it has none."""
    return item["image"] or f"no image: {item['id']}"


def _sum_by_image(tallies: Sequence[Mapping[Any, float]], images: Sequence[str]) -> tuple[list[Any], np.ndarray]:
    """The names of all sums [K], and the table [P, K] of each image's sums."""
    rows = {image: row for row, image in enumerate(dict.fromkeys(images))}
    columns = {name: column for column, name in enumerate(dict.fromkeys(name for tally in tallies for name in tally))}
    table = np.zeros((len(rows), len(columns)))
    cells = [(rows[image], columns[name]) for image, tally in zip(images, tallies, strict=True) for name in tally]
    places = np.array(cells, dtype=int).reshape(-1, 2)
    # `add.at` and not `table[...] +=`, which would count a cell that occurs twice only once.
    np.add.at(table, (places[:, 0], places[:, 1]), [value for tally in tallies for value in tally.values()])
    return list(columns), table
