"""Calibration: against numbers worked out by hand, and against predictions that are right by construction."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.statistics.calibration import (
    brier,
    calibration_error,
    error_of_the_calibrated,
    fitted_temperature,
    reliability,
    sigmoid,
)

predictions = st.lists(
    st.tuples(st.integers(0, 20).map(lambda n: n / 20), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=60
)


def test_error_and_brier_are_those_worked_out_by_hand() -> None:
    probabilities = np.array([0.6, 0.6, 0.6, 0.6, 0.9, 0.9, 0.9, 0.9])
    outcomes = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    bins = reliability(probabilities, outcomes, 2)
    assert [(b.count, b.low, b.high, b.observed) for b in bins] == [(4, 0.6, 0.6, 0.5), (4, 0.9, 0.9, 0.75)]
    assert calibration_error(bins) == pytest.approx((4 * 0.1 + 4 * 0.15) / 8)
    assert brier(probabilities, outcomes) == pytest.approx((2 * 0.16 + 2 * 0.36 + 3 * 0.01 + 0.81) / 8)


def test_a_hundred_predictions_make_ten_bins_unless_another_number_is_asked_for() -> None:
    p = np.arange(100) / 100
    assert [b.count for b in reliability(p, p.round())] == [10] * 10
    assert [b.count for b in reliability(p, p.round(), 4)] == [25] * 4


def test_saying_one_half_each_time_scores_a_quarter() -> None:
    assert brier(np.full(4, 0.5), np.array([1.0, 0.0, 1.0, 0.0])) == 0.25


def test_predictions_that_are_right_have_the_error_that_chance_alone_gives() -> None:
    rng = np.random.default_rng(0)
    sizes = {}
    for count in (200, 20_000):
        p = rng.uniform(0.5, 1, count)
        errors = [calibration_error(reliability(p, (rng.random(count) < p).astype(float))) for _ in range(20)]
        sizes[count] = float(np.mean(errors))
        assert sizes[count] == pytest.approx(error_of_the_calibrated(p), rel=0.25)
    assert sizes[20_000] < 0.012 < sizes[200]


def test_predictions_that_are_too_sure_have_an_error_and_the_temperature_that_puts_them_right() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=40_000)
    won = rng.random(len(logits)) < sigmoid(logits)
    shown = 3 * np.where(won, logits, -logits)  # by how much what won was ahead, three times too sure
    sure, right = sigmoid(np.abs(shown)), (shown > 0).astype(float)
    assert calibration_error(reliability(sure, right)) > 0.15
    temperature = fitted_temperature(shown)
    assert temperature == pytest.approx(3, rel=0.05)
    assert calibration_error(reliability(sigmoid(np.abs(shown) / temperature), right)) < 0.01


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_temperature_is_where_the_likelihood_is_greatest(scale: float) -> None:
    x = scale * np.array([2.0, 1.0, 0.5, -0.7, 0.0])
    temperature = fitted_temperature(x)
    assert temperature is not None

    def loss(t: float) -> float:
        return float(np.mean(np.logaddexp(0, -x / t)))

    assert loss(temperature) <= min(loss(0.98 * temperature), loss(1.02 * temperature))


@pytest.mark.parametrize("differences", [[], [1.0, 2.0], [-1.0, 0.5], [0.0, 0.0], [1.0, 0.0]])
def test_there_is_no_temperature_without_both_errors_and_skill(differences: list[float]) -> None:
    assert fitted_temperature(np.array(differences)) is None


@settings(max_examples=100, deadline=None)
@given(predictions, st.integers(1, 12), st.randoms(use_true_random=False))
def test_bins_hold_each_prediction_once_whatever_the_order(
    rows: list[tuple[float, float]], count: int, random: object
) -> None:
    probabilities, outcomes = (np.array(column) for column in zip(*rows, strict=True))
    bins = reliability(probabilities, outcomes, count)
    assert sum(b.count for b in bins) == len(rows) and len(bins) <= count
    assert all(one.high < other.low for one, other in itertools.pairwise(bins))
    assert all(b.count and b.low <= b.predicted + 1e-12 and b.predicted <= b.high + 1e-12 for b in bins)
    assert 0 <= calibration_error(bins) <= 1
    random.shuffle(rows)  # type: ignore[attr-defined]
    again = reliability(*(np.array(column) for column in zip(*rows, strict=True)), count)
    assert [(b.count, b.low) for b in again] == [(b.count, b.low) for b in bins]
    assert calibration_error(again) == pytest.approx(calibration_error(bins), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(predictions)
def test_the_error_in_one_bin_is_the_distance_of_the_means(rows: list[tuple[float, float]]) -> None:
    probabilities, outcomes = (np.array(column) for column in zip(*rows, strict=True))
    expected = abs(probabilities.mean() - outcomes.mean())
    assert calibration_error(reliability(probabilities, outcomes, 1)) == pytest.approx(expected, abs=1e-12)


def test_sigmoid_is_right_and_does_not_overflow() -> None:
    assert sigmoid(np.array([-1e300, 0.0, 1e300])).tolist() == [0.0, 0.5, 1.0]
    assert float(sigmoid(np.array([1.5]))[0]) == pytest.approx(1 / (1 + math.exp(-1.5)), rel=1e-12)


@pytest.mark.parametrize(
    ("probabilities", "outcomes", "message"),
    [([], [], "N > 0"), ([0.5], [1.0, 0.0], "expected"), ([1.1], [1.0], "from 0 to 1"), ([math.nan], [1.0], "from 0")],
)
def test_what_is_no_probability_is_refused(probabilities: list[float], outcomes: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reliability(np.array(probabilities), np.array(outcomes))
