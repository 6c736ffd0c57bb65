"""Intervals of scores: images are drawn, and the interval is for the benchmark's own score."""

import math

import numpy as np
import pytest
from oracle_tools import near

from tinyllava.eval.benchmarks import Benchmark, custom, mme, pope, scienceqa
from tinyllava.eval.intervals import SumTable, compute_intervals, identify_image


def item(number: int, image: str, score: float | None, category: str = "", **more: object) -> dict:
    return {"id": str(number), "image": image, "score": score, "category": category, **more}


def score_sums(benchmark: Benchmark, items: list[dict]) -> float:
    return SumTable(benchmark, items, [identify_image(one) for one in items]).compute_score()


def test_questions_on_one_image_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.7
    alone = [item(n, f"{n}.png", float(one)) for n, one in enumerate(right)]
    five = [item(5 * n + k, f"{n}.png", float(one)) for n, one in enumerate(right) for k in range(5)]
    wide, same, narrow = (
        compute_intervals(custom.Benchmark(), items)[0]
        for items in (alone, five, [one | {"image": ""} for one in five])
    )
    assert wide == near(same)  # five equal answers on a picture tell no more than one
    share = right.mean()
    half = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert wide == pytest.approx([100 * (share - half), 100 * (share + half)], abs=1.0)
    assert narrow[1] - narrow[0] == pytest.approx((wide[1] - wide[0]) / math.sqrt(5), rel=0.1)


def test_an_interval_is_repeatable_and_none_for_one_image() -> None:
    items = [item(n, f"{n // 2}.png", n % 3 / 2, "ab"[n % 2]) for n in range(40)]
    assert compute_intervals(custom.Benchmark(), items) == compute_intervals(custom.Benchmark(), items)
    whole, categories = compute_intervals(custom.Benchmark(), items)
    assert whole[0] < 100 * np.mean([one["score"] for one in items]) < whole[1]
    assert list(categories) == ["a", "b"] and all(0 <= low < high <= 1 for low, high in categories.values())
    assert compute_intervals(custom.Benchmark(), items[:2]) == (None, {})
    assert compute_intervals(custom.Benchmark(), [one | {"score": None} for one in items]) == (None, {})


def test_a_rare_category_may_be_missing_from_a_draw() -> None:
    items = [item(n, f"{n}.png", 1.0, "common") for n in range(9)] + [item(9, "9.png", 0.0, "rare")]
    _, categories = compute_intervals(custom.Benchmark(), items)
    assert categories["rare"] == [0.0, 0.0]


def test_pope_is_resampled_as_f1() -> None:
    items = [
        item(n, f"{n // 6}.png", 1.0, category, parsed=result, gold=gold)
        for n, (category, result, gold) in enumerate(
            (category, result, gold)
            for category in pope.CATEGORIES
            for result, gold, times in (("yes", "yes", 5), ("yes", "no", 2), ("no", "no", 3), ("no", "yes", 1))
            for _ in range(times)
        )
    ]
    f1 = 2 * 5 / (2 * 5 + 2 + 1)
    assert score_sums(pope.Benchmark(), items) == near(100 * f1)
    low, high = compute_intervals(pope.Benchmark(), items)[0]
    assert low < 100 * f1 < high
    assert pope.Benchmark().headline({}) == 0.0


def test_mme_pairs_stay_together() -> None:
    rng = np.random.default_rng(1)
    items = [
        item(2 * n + k, f"{n}.png", float(rng.random() < 0.7), category, gold="Yes", answer="yes")
        for n, category in enumerate(["existence", "OCR", "code_reasoning"] * 8)
        for k in range(2)
    ]
    mme.mark_pairs(items)
    assert all(one["both"] is not None for one in items)
    right = {c: [one["score"] for one in items if one["category"] == c] for c in ("existence", "OCR")}
    expected = sum(100 * np.mean(r) + 100 * np.mean(np.multiply(r[::2], r[1::2])) for r in right.values())
    assert score_sums(mme.Benchmark(), items) == near(expected)  # cognition is no part of it
    alone = [item(99, "99.png", 1.0, "OCR", gold="Yes", answer="yes")]
    mme.mark_pairs(alone)
    assert score_sums(mme.Benchmark(), [*items, *alone]) == near(expected)


def test_scienceqa_counts_questions_with_an_image() -> None:
    items = [item(n, "", float(n % 4 == 0), counts=n % 2 == 0) for n in range(40)]
    assert score_sums(scienceqa.Benchmark(), items) == near(50.0)
