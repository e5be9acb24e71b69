"""Coefficients of agreement against published examples, a second implementation, and what must not change them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.feedback_coverage import agreement as coverage
from rlhf_fast.statistics.agreement import (
    Agreement,
    Votes,
    ceiling,
    cohen_kappa,
    fleiss_kappa,
    gwet_ac1,
    krippendorff_alpha,
    raw_agreement,
)
from rlhf_fast.statistics.intervals import Interval

COEFFICIENTS: dict[str, Any] = {
    "raw": lambda votes, **_: raw_agreement(votes),
    "cohen": cohen_kappa,
    "fleiss": fleiss_kappa,
    "ac1": gwet_ac1,
    "nominal": krippendorff_alpha,
    "ordinal": lambda votes, **more: krippendorff_alpha(votes, "ordinal", **more),
    "interval": lambda votes, **more: krippendorff_alpha(votes, "interval", **more),
}
# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): four observers, twelve units, 0 for no vote.
RELIABILITY = np.array([
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
])  # fmt: skip
BINARY = np.array([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]) + 1  # section A of the same


def votes_of(matrix: np.ndarray) -> Votes:
    """Observers in rows, units in columns, 0 for no vote."""
    people, items = np.nonzero(matrix)
    return Votes(items, people, matrix[people, items])


def value(agreement: Agreement) -> float:
    assert agreement.interval is not None
    return agreement.interval.mean


@pytest.mark.parametrize(("metric", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_four_observers(metric: str, published: float) -> None:
    found = krippendorff_alpha(votes_of(RELIABILITY), metric, resamples=50)
    assert value(found) == pytest.approx(published, abs=5e-4)
    assert found.doubles == 11 and found.too_few


def test_krippendorffs_two_observers_of_binary_data() -> None:
    assert value(krippendorff_alpha(votes_of(BINARY), resamples=50)) == pytest.approx(0.095, abs=5e-4)


def test_fleiss_own_example() -> None:
    """Fleiss (1971) as worked through in many places: 14 raters, 10 subjects, 5 categories, kappa 0.210."""
    counts = np.array([
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ])  # fmt: skip
    values = np.concatenate([np.repeat(np.arange(5), row) for row in counts])
    votes = Votes(np.repeat(np.arange(10), 14), np.tile(np.arange(14), 10), values)
    assert value(fleiss_kappa(votes, resamples=50)) == pytest.approx(0.210, abs=5e-4)
    assert value(raw_agreement(votes)) == pytest.approx(0.378, abs=5e-4)


def test_cohens_kappa_of_two_by_hand() -> None:
    # 20 both yes, 15 both no, 5 and 10 apart: 0.7 observed, 0.5 by chance.
    table = np.repeat([[1, 1], [1, 2], [2, 1], [2, 2]], [20, 5, 10, 15], axis=0).T
    assert value(cohen_kappa(votes_of(table), 0, 1)) == pytest.approx(0.4)
    assert value(cohen_kappa(votes_of(table))) == pytest.approx(0.4)


def test_the_mean_kappa_weighs_pairs_by_their_items() -> None:
    table = np.zeros((3, 40), np.int64)
    rng = np.random.default_rng(0)
    table[0], table[1, :30], table[2, 20:] = rng.integers(1, 4, 40), rng.integers(1, 4, 30), rng.integers(1, 4, 20)
    votes = votes_of(table)
    pairs = {(0, 1): 30, (0, 2): 20, (1, 2): 10}
    mean = sum(n * value(cohen_kappa(votes, *pair)) for pair, n in pairs.items()) / 60
    assert value(cohen_kappa(votes)) == pytest.approx(mean)
    of_one = (20 * value(cohen_kappa(votes, 0, 2)) + 10 * value(cohen_kappa(votes, 1, 2))) / 30
    assert value(cohen_kappa(votes, 2)) == pytest.approx(of_one) and cohen_kappa(votes, 2).doubles == 20


def test_ac1_by_hand_where_one_value_dominates() -> None:
    table = np.repeat([[1, 1], [1, 2], [2, 1], [2, 2]], [118, 5, 2, 0], axis=0).T  # Gwet (2008): kappa fails
    assert value(cohen_kappa(votes_of(table))) < 0
    share = (118 * 2 + 7) / 250
    chance = 2 * share * (1 - share)
    assert value(gwet_ac1(votes_of(table))) == pytest.approx((118 / 125 - chance) / (1 - chance))


@st.composite
def matrices(draw: Any) -> np.ndarray:
    people, items = draw(st.integers(2, 5)), draw(st.integers(3, 12))
    cells = draw(st.lists(st.integers(0, 4), min_size=people * items, max_size=people * items))
    return np.array(cells).reshape(people, items)


@pytest.mark.parametrize("metric", ["nominal", "ordinal", "interval"])
@settings(max_examples=15, deadline=None)
@given(matrix=matrices())
def test_alpha_is_that_of_a_second_implementation(metric: str, matrix: np.ndarray) -> None:
    evalica = pytest.importorskip("evalica")
    pandas = pytest.importorskip("pandas")
    found = krippendorff_alpha(votes_of(matrix), metric, resamples=1).interval
    frame = pandas.DataFrame(np.where(matrix == 0, np.nan, matrix))
    paired = matrix[:, (matrix > 0).sum(axis=0) > 1]
    if found is None:  # nothing varies, or hardly any unit has two votes
        assert (paired > 0).sum() == 0 or len(np.unique(paired[paired > 0])) == 1 or paired.shape[1] < 2
    else:
        assert found.mean == pytest.approx(evalica.alpha(frame, metric).alpha, abs=1e-9)


def test_the_bootstrap_is_near_that_of_a_second_implementation() -> None:
    """Theirs (Hayes and Krippendorff's) draws pairs of votes with chance held fixed, ours whole items."""
    evalica = pytest.importorskip("evalica")
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(1)
    truth = rng.integers(1, 3, 300)
    matrix = np.where(rng.random((2, 300)) < 0.15, 3 - truth, truth)
    theirs = evalica.alpha_bootstrap(pandas.DataFrame(matrix.astype(float)), n_resamples=1000, random_state=0)
    ours = krippendorff_alpha(votes_of(matrix)).interval
    assert ours is not None and ours.mean == pytest.approx(theirs.alpha)
    assert ours.low == pytest.approx(theirs.low, abs=0.03) and ours.high == pytest.approx(theirs.high, abs=0.03)


@pytest.mark.parametrize("name", COEFFICIENTS)
@settings(max_examples=12, deadline=None)
@given(matrix=matrices(), seed=st.integers(0, 99))
def test_order_and_names_say_nothing(name: str, matrix: np.ndarray, seed: int) -> None:
    votes, rng = votes_of(matrix), np.random.default_rng(seed)
    order = rng.permutation(len(votes.items))
    shuffled = Votes(votes.items[order], votes.people[order], votes.values[order])
    items, people = rng.permutation(50)[votes.items], rng.permutation(50)[votes.people]
    renamed = Votes(items, people, votes.values)
    find = COEFFICIENTS[name]
    one = find(votes, resamples=20)
    assert find(shuffled, resamples=20) == one or name == "cohen"  # to the bit, but for the order of sums
    for other in (find(shuffled, resamples=1), find(renamed, resamples=1)):
        assert (other.interval is None) == (one.interval is None)
        if one.interval is not None:
            assert value(other) == pytest.approx(value(one), abs=1e-9)


@pytest.mark.parametrize("name", COEFFICIENTS)
@settings(max_examples=12, deadline=None)
@given(truth=st.lists(st.integers(1, 4), min_size=2, max_size=30), people=st.integers(2, 4))
def test_perfect_agreement_is_one_and_its_interval_no_point(name: str, truth: list[int], people: int) -> None:
    votes = votes_of(np.tile(np.array(truth), (people, 1)))
    found = COEFFICIENTS[name](votes, resamples=5).interval
    if len(set(truth)) == 1 and name != "raw":
        assert found is None  # by chance they would agree, too
    else:
        assert found is not None and found.mean == pytest.approx(1) and found.low < 0.95
        assert found.high == pytest.approx(1)


def test_nobody_agrees_with_nobody() -> None:
    votes = Votes(np.arange(5), np.arange(5), np.arange(5))
    for find in COEFFICIENTS.values():
        assert find(votes) == Agreement(None, 0)
    empty = np.zeros(0, np.int64)
    assert raw_agreement(Votes(empty, empty, empty)).too_few


def test_balanced_votes_have_the_alpha_and_the_ceiling_of_their_agreement() -> None:
    truth = np.repeat([1, 2], 500)
    wrong = np.zeros((2, 1000), bool)
    wrong[0, :135], wrong[0, 500:635] = True, True  # of every 500, 135 differ: 73 %
    matrix = np.where(wrong, 3 - truth, truth)
    votes = votes_of(matrix)
    assert value(raw_agreement(votes)) == pytest.approx(0.73)
    assert value(krippendorff_alpha(votes)) == pytest.approx(2 * 0.73 - 1, abs=1e-3)
    assert not raw_agreement(votes).too_few
    reach = ceiling(Interval(0.73, 0.70, 0.76))
    assert (reach.low, reach.least) == (0.73, 0.70)
    assert reach.high == pytest.approx(0.839, abs=5e-4) and reach.most == pytest.approx((1 + math.sqrt(0.52)) / 2)
    assert ceiling(0.4).high == 0.5 and ceiling(1.0).high == 1.0


def test_same_seed_same_interval() -> None:
    rng = np.random.default_rng(3)
    votes = votes_of(rng.integers(0, 3, (3, 80)))
    for find in (cohen_kappa, fleiss_kappa, gwet_ac1, krippendorff_alpha):
        assert find(votes, resamples=100, seed=4) == find(votes, resamples=100, seed=4)
        assert find(votes, resamples=100, seed=4) != find(votes, resamples=100, seed=5)


def test_what_cannot_be_right_is_refused() -> None:
    numbers = np.arange(3)
    with pytest.raises(ValueError, match=r"values: float64 of shape \(3,\) came; expected whole numbers"):
        Votes(numbers, numbers, np.array([0.5, 1, 2]))
    with pytest.raises(ValueError, match="3, 3 and 2 came; expected one of each for every vote"):
        Votes(numbers, numbers, numbers[:2])
    with pytest.raises(ValueError, match="person 7 voted 2 times on item 1; expected once"):
        Votes(np.array([1, 1, 2]), np.array([7, 7, 7]), numbers)
    with pytest.raises(ValueError, match="101 distinct ones came; expected at most 100"):
        Votes(np.arange(101), np.arange(101), np.arange(101))
    votes = Votes(numbers, numbers, numbers)
    with pytest.raises(ValueError, match="metric: 'ratio' came; expected nominal, ordinal or interval"):
        krippendorff_alpha(votes, "ratio")
    with pytest.raises(ValueError, match="people: 1 and 1 came; expected two different people"):
        cohen_kappa(votes, 1, 1)
    with pytest.raises(ValueError, match="level: 2 is outside"):
        fleiss_kappa(votes, level=2)
    with pytest.raises(ValueError, match="resamples: 0 came"):
        fleiss_kappa(votes, resamples=0)
    with pytest.raises(ValueError, match=r"agreement: 73 came; expected a share from 0 to 1"):
        ceiling(73)


def test_intervals_hold_the_truth() -> None:
    """Of 60 runs at 95 %, fewer than 51 happen once in 300, and for intervals that hold it in 80 % nearly always."""
    for name, held in coverage(60, 200, 200).items():
        assert sum(held) >= 51, (name, sum(held))


@pytest.mark.slow
@pytest.mark.seconds(8)
def test_intervals_hold_the_truth_in_95_of_100_runs() -> None:
    """Of 200 runs at 95 %, 182 to 198 hold the truth but once in 100."""
    for name, held in coverage(200).items():
        assert 182 <= sum(held) <= 199, (name, sum(held))
