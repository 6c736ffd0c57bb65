"""Test whether two models differ on the same questions: `tinyllava eval --compare runs/a runs/b`.

Scores are compared question by question. The interval of their difference is a paired bootstrap over images. If answers
are right or wrong and the score is their mean, p comes from McNemar's exact test. That test assumes independent
questions, but questions on one image are not. So a difference counts only if its interval also excludes 0. For all
other scores, p comes from the bootstrap.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Benchmark, ScoredItem
from tinyllava.eval.benchmarks._files import explain_form, read_jsonl
from tinyllava.eval.intervals import SumTable, compute_bounds, identify_image, resample
from tinyllava.eval.results import ITEMS, RESULTS, load_results
from tinyllava.eval.tasks import JSONL, find_task
from tinyllava.factory import Factory

DRAWS = 10_000  # more than for the interval of a score: the smallest p that a bootstrap can show is about 1 / DRAWS
ALPHA = 0.05
COMPARED = (  # what must be the same in both scored items of a question
    ("data: the right answer", lambda item: item["gold"]),
    ("data: the image", lambda item: Path(item["image"]).name),
    ("prompts: the prompt", lambda item: item["prompt"]),
)


class Comparison(NamedTuple):
    """Two scores of a task, the second minus the first in points, its 95 % interval, and p for "no difference"."""

    title: str
    scores: tuple[float, float]
    difference: float
    interval: list[float]
    p: float
    test: str

    @property
    def differs(self) -> bool:
        """Whether both the test and the interval show a difference."""
        return self.p < ALPHA and not self.interval[0] <= 0 <= self.interval[1]

    def to_sentence(self, a: str, b: str) -> str:
        """The result in one plain sentence."""
        low, high = self.interval
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.2g}"
        figures = (
            f"{self.scores[1]:.1f} against {self.scores[0]:.1f}, {self.difference:+.1f} points"
            f" (95 % interval {low:+.1f} to {high:+.1f}, {p}, {self.test})"
        )
        if not self.differs:
            return f"{self.title}: {b} and {a} do not differ significantly: {figures}."
        return f"{self.title}: {b} is {'better' if self.difference > 0 else 'worse'} than {a}: {figures}."


def compare_runs(a: str | Path, b: str | Path, tasks: Sequence[str] | None = None) -> list[Comparison]:
    """Compare two runs, or two directories of `tinyllava score`, on `tasks` (default: all that both have scored).

    Raises UserError if the questions, prompts, data or scorers of a task are not the same, and says which.
    """
    a_entries, b_entries = _load_entries(Path(a)), _load_entries(Path(b))
    common = [name for name in a_entries if name in b_entries]
    present = f"{a} has {', '.join(a_entries) or 'no scores'}, {b} has {', '.join(b_entries) or 'no scores'}"
    for name in tasks or []:
        if name not in common:
            raise UserError(f"{name} is not scored in both: {present}.")
    if not common:
        raise UserError(f"nothing to compare: {present}.")
    comparisons = []
    for name in tasks or common:
        with explain_form(f"the results of {name} in {a} or {b}", "Score the answers again."):
            comparisons.append(_compare_task(name, Path(a), a_entries[name], Path(b), b_entries[name]))
    return comparisons


def _compare_task(name: str, a: Path, a_entry: dict[str, Any], b: Path, b_entry: dict[str, Any]) -> Comparison:
    for fact in ("scorer", "metric"):
        if a_entry[fact] != b_entry[fact]:
            raise UserError(f"{name}: not the same {fact}: '{a_entry[fact]}' in {a}, '{b_entry[fact]}' in {b}.")
    if a_entry["score"] is None:
        raise UserError(f"{name} was not scored here ({a_entry['metric']}), so there is nothing to compare.")
    a_items, b_items = match_items(name, _load_items(a, name), _load_items(b, name))
    return compare_items(_find_benchmark(name, a_entry), a_entry["title"], a_items, b_items)


def compare_items(benchmark: Benchmark, title: str, a: list[ScoredItem], b: list[ScoredItem]) -> Comparison:
    """Compare scored items that answer the same questions, in the same order."""
    images = [identify_image(item) for item in a]
    a_sums, b_sums = SumTable(benchmark, a, images), SumTable(benchmark, b, images)
    scores = a_sums.compute_score(), b_sums.compute_score()
    # Both tables in one draw: the same images are drawn for both models, which makes the bootstrap paired.
    drawn = resample(np.hstack([a_sums.table, b_sums.table]), DRAWS)
    width = len(a_sums.names)
    differences = b_sums.compute_scores(drawn[:, width:]) - a_sums.compute_scores(drawn[:, :width])
    p, test = _compute_bootstrap_p(differences), f"paired bootstrap over {len(set(images)):,} images"
    counted = [(x["score"], y["score"]) for x, y in zip(a, b, strict=True) if benchmark.tally(x)]
    if benchmark.is_mean and all(score in (0, 1) for pair in counted for score in pair):
        outcomes = Counter(counted)
        p = compute_mcnemar(outcomes[1, 0], outcomes[0, 1])
        test = f"exact McNemar: {outcomes[1, 0]:,} right only in the first, {outcomes[0, 1]:,} only in the second"
    return Comparison(title, scores, scores[1] - scores[0], compute_bounds(differences), p, test)


def compute_mcnemar(only_a: int, only_b: int) -> float:
    """The two-sided p of McNemar's exact test (1947).

    `only_a` and `only_b`: how many questions only A, or only B, answers correctly. If there is no difference, each of
    these n questions falls to A or to B with probability 1/2. p is twice the probability that one side gets
    min(only_a, only_b) or fewer of them, and at most 1.
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    if not n:
        return 1.0
    # In logarithms, because the binomial coefficients of thousands of questions overflow a float.
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(log - n * math.log(2)) for log in logs))


def _compute_bootstrap_p(differences: np.ndarray) -> float:
    """Twice the share of draws on the rarer side of 0, but at least 1 / (draws + 1): fewer draws cannot show less."""
    share = min(np.mean(differences <= 0), np.mean(differences >= 0))
    return float(min(1.0, max(2 * share, 1 / (len(differences) + 1))))


def match_items(name: str, a: list[ScoredItem], b: list[ScoredItem]) -> tuple[list[ScoredItem], list[ScoredItem]]:
    """The items of both, in the same order. Raises UserError if questions, right answers, images or prompts differ."""
    first, second = _number_items(a), _number_items(b)
    if first.keys() != second.keys():
        only_first = [key[0] for key in first if key not in second]
        only_second = [key[0] for key in second if key not in first]
        raise UserError(
            f"{name}: not the same questions: {len(only_first)} are only in the first, {len(only_second)} only in the"
            f" second (such as '{(only_first or only_second)[0]}'), of {len(first)} and {len(second)}."
        )
    for what, get_value in COMPARED:
        values = {key: (get_value(first[key]), get_value(second[key])) for key in first}
        # An empty value is unknown: not every answers file has prompts, and not every layout has images.
        differing = [key for key, (x, y) in values.items() if x != y and x != "" and y != ""]
        if differing:
            x, y = (str(value)[:100] for value in values[differing[0]])
            raise UserError(
                f"{name}: not the same {what} differs for {len(differing)} of {len(first)} questions, such as"
                f" '{differing[0][0]}': {x!r} and {y!r}."
            )
    return list(first.values()), [second[key] for key in first]


def _number_items(items: list[ScoredItem]) -> dict[tuple[str, int], ScoredItem]:
    """The items by id and number: 1 for the first item with an id, 2 for the second, and so on."""
    counts: Counter[str] = Counter()
    numbered = {}
    for item in items:
        counts[item["id"]] += 1
        numbered[item["id"], counts[item["id"]]] = item
    return numbered


def _load_entries(place: Path) -> dict[str, Any]:
    path = place if place.name == RESULTS else place / RESULTS
    if not path.is_file():
        raise UserError(f"there is no {path}. Compare runs or directories that `tinyllava eval` or `score` wrote.")
    return load_results(path)["tasks"]


def _load_items(place: Path, name: str) -> list[ScoredItem]:
    path = (place.parent if place.name == RESULTS else place) / "eval" / name / ITEMS
    if not path.is_file():
        raise UserError(f"there is no {path}, which belongs to {RESULTS}. Score the answers again.")
    return read_jsonl(path)


def _find_benchmark(name: str, entry: dict[str, Any]) -> Benchmark:
    if entry["data"]["root"].endswith(JSONL):  # a user's own questions, whose file may be gone by now
        return Factory("benchmarks").get("custom")()
    return find_task(name).benchmark
