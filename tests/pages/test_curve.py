"""The curve of a run: the thick line is a mean without a bias at its start."""

import pytest

from tinyllava.pages import curve


def test_smoothing_starts_without_a_bias_and_follows() -> None:
    assert curve.smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    noisy = curve.smooth([1.0 + (-1) ** i for i in range(200)])
    assert abs(noisy[100:] - 1.0).max() < 0.1
    assert curve.read_series(
        [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}, {"step": 2, "loss": None}], "loss"
    ) == (
        [1],
        [2.0],
    )
