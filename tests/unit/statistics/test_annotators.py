"""What one annotator's votes are worth, on people whose faults are planted."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_fast.statistics.annotators import (
    confusion,
    drift,
    gold_accuracy,
    leaning,
    logistic,
    self_consistency,
    side_bias,
    speed,
    with_others,
)
from rlhf_fast.statistics.intervals import wilson
from rlhf_fast.statistics.votes import Votes


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_consistency_and_gold_are_shares_by_person() -> None:
    people = np.array([4, 4, 4, 4, 9])
    first, second = np.array([1, 2, 1, 2, 1]), np.array([1, 2, 2, 2, 2])
    for found in (self_consistency(people, first, second), gold_accuracy(people, first, second)):
        assert found == {4: wilson(3, 4), 9: wilson(0, 1)}
    # By the formula: 8 of 10 at 95 %.
    tenth = wilson(8, 10)
    assert (tenth.low, tenth.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_a_share_of_independent_judgements_is_held() -> None:
    rng = np.random.default_rng(0)
    held = [wilson(int(k), 60) for k in rng.binomial(60, 0.9, 400)]
    assert 0.93 <= np.mean([i.low <= 0.9 <= i.high for i in held]) <= 0.99


def test_a_lean_to_the_left_is_seen_and_ties_say_nothing() -> None:
    rng = np.random.default_rng(1)
    people = np.repeat([0, 1, 2], 400)
    sides = np.where(rng.random(1200) < np.repeat([0.5, 0.62, 0.5], 400), -1, 1)
    sides[people == 2] = 0
    found = side_bias(people, sides)
    assert found.keys() == {0, 1}
    assert found[0].low < 0.5 < found[0].high and found[1].low > 0.5


def test_confusion_counts_who_said_what() -> None:
    items, people = np.array([0, 0, 1, 1, 2, 2, 3]), np.array([0, 5, 0, 5, 0, 5, 0])
    votes = Votes(items, people, np.array([-1, 1, 1, 1, -1, 0, 0]))
    found = confusion(votes, 0, 5)
    assert found.values == [-1, 0, 1]
    assert found.counts.tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 1]]
    assert confusion(votes, 5, 0).counts.tolist() == found.counts.T.tolist()


def test_agreement_with_the_others_of_an_item() -> None:
    votes = Votes(np.array([0, 0, 0, 1, 2, 2]), np.array([0, 1, 2, 0, 0, 1]), np.array([1, 1, 2, 1, 3, 3]))
    assert with_others(votes).tolist() == pytest.approx([0.5, 0.5, 0, np.nan, 1, 1], nan_ok=True)


def of_two(seed: int, first_half: float, second_half: float) -> tuple[Votes, np.ndarray]:
    """Two people on 300 items; the second agrees with the first so often in each half of the time."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, 300)
    same = rng.random(300) < np.repeat([first_half, second_half], 150)
    votes = Votes(np.tile(np.arange(300), 2), np.repeat([0, 1], 300), np.concatenate([truth, truth ^ ~same]))
    return votes, np.tile(np.arange(300.0), 2)


def test_a_drift_is_seen_and_none_is_not() -> None:
    found = drift(*of_two(0, 0.9, 0.7), person=1)
    assert found.change is not None and found.change.high < 0
    assert len(found.periods) == 4 and sum(period.votes for period in found.periods) == 300
    assert found.periods[0].agreement.low > found.periods[3].agreement.mean
    assert found.periods[0].start == 0 and found.periods[3].end == 299
    steady = [drift(*of_two(seed, 0.8, 0.8), person=1, seed=seed).change for seed in range(40)]
    assert sum(i is not None and i.low <= 0 <= i.high for i in steady) >= 33  # once in 700 fewer
    everybody = drift(*of_two(0, 0.9, 0.7))
    assert everybody.change is not None and everybody.change.high < 0
    few = Votes(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.array([1, 1, 1, 1]))
    assert drift(few, np.arange(4), periods=1).change is None


def test_leanings_to_length_and_side_are_told_from_what_the_pair_is_worth() -> None:
    """A person who votes by length and right, another by the pair alone, where better responses are longer ones."""
    held = {"side": 0, "length": 0, "none": 0, "seems": 0}
    for seed in range(30):
        rng = np.random.default_rng(seed)
        worth = rng.normal(size=500)
        longer = 40 * (0.5 * worth + rng.normal(size=500))
        scale = np.sqrt((longer**2).mean())
        leans = np.where(rng.random(500) < sigmoid(0.4 + 0.8 * longer / scale), 1, -1)
        found = leaning(leans, longer)
        held["side"] += found.side.low <= 0.4 <= found.side.high
        held["length"] += found.length.low <= 0.8 <= found.length.high
        honest = np.where(rng.random(500) < sigmoid(worth), 1, -1)
        beyond = leaning(honest, longer, worth)  # the others know the pair's worth
        assert beyond.others is not None and beyond.others.low > 0
        held["seems"] += leaning(honest, longer).length.low > 0
        held["none"] += beyond.length.low <= 0 <= beyond.length.high
    assert min(held.values()) >= 25  # of 30 at 95 %, fewer once in 300


def test_hasty_votes_are_seen() -> None:
    rng = np.random.default_rng(2)
    seconds = np.exp(rng.normal(3, 1, 600))
    agrees = (rng.random(600) < sigmoid(1 + 0.6 * (np.log(seconds) - 3))).astype(float)
    agrees[::10] = np.nan
    assert speed(agrees, seconds).low > 0
    assert speed(rng.permutation(agrees), seconds).low < 0 < speed(rng.permutation(agrees), seconds).high
    assert speed(agrees, np.full(600, 5.0)).mean == 0  # the same time for all says nothing


def test_the_regression_is_at_the_maximum_and_finite_for_the_foreseeable() -> None:
    rng = np.random.default_rng(3)
    features = np.stack([np.ones(80), rng.normal(size=80)], axis=1)
    outcomes = (features[:, 1] > 0).astype(float)
    weights = np.array([i.mean for i in logistic(outcomes, features)])
    slope = features.T @ (outcomes - sigmoid(features @ weights)) - weights / 4
    assert np.abs(slope).max() < 1e-8 and 2 < weights[1] < 20
    assert logistic(np.full(4, 0.5), np.ones((4, 1)))[0].mean == 0


def test_what_cannot_be_right_is_refused() -> None:
    two, three = np.arange(2), np.arange(3)
    with pytest.raises(ValueError, match=r"votes: .*'first': \(2,\).* came; expected \(N,\) of each"):
        self_consistency(three, two, two)
    with pytest.raises(ValueError, match="people: 3 twice; expected two different people"):
        confusion(Votes(two, two, two), 3, 3)
    with pytest.raises(ValueError, match="seconds: 0 came; expected times above 0"):
        speed(np.ones(2), two)
    with pytest.raises(ValueError, match="right and of: 3 and 2 came; expected 0 <= right <= of"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="votes: none came; expected at least one"):
        leaning(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="level: 95 is outside"):
        wilson(1, 2, 95)
