"""What one annotator's votes are worth: consistency, gold accuracy, leaning to a side or to length, speed, drift.

Sides are numbers as the annotator saw them: -1 for the left response, 1 for the right one, 0 for a tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rlhf_fast.statistics.calibration import sigmoid
from rlhf_fast.statistics.intervals import Interval, clustered_bootstrap, clustered_share, wilson
from rlhf_fast.statistics.votes import Votes, pairs_of_people

PRIOR = 2.0  # deviation of the weights' prior, in log-odds: keeps them finite where votes can be foretold exactly


def self_consistency(people: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict[int, Interval]:
    """How often each person says the same when an item is silently shown again: all that others can agree to, at best.

    Args:
        people: (R,) int, of each repeat.
        first, second: (R,) int, the two answers, in the order of the pair's own responses and not of the sides.
    """
    _one_length(people=people, first=first, second=second)
    return _shares(people, np.asarray(first) == np.asarray(second))


def gold_accuracy(people: np.ndarray, answers: np.ndarray, gold: np.ndarray) -> dict[int, Interval]:
    """How often each person's answer (R,) to an item whose answer is known is that answer, with Wilson's interval."""
    _one_length(people=people, answers=answers, gold=gold)
    return _shares(people, np.asarray(answers) == np.asarray(gold))


def side_bias(people: np.ndarray, sides: np.ndarray) -> dict[int, Interval]:
    """The share of each person's decided votes that went to the left response. Where sides are drawn at random one
    half is without bias, whatever the pairs: an interval beyond it is a lean. Who has only ties is left out."""
    _one_length(people=people, sides=sides)
    decided = np.asarray(sides) != 0
    return _shares(np.asarray(people)[decided], np.asarray(sides)[decided] < 0)


@dataclass(frozen=True)
class Confusion:
    """What one person answered (rows) where another did (columns), on the items that both judged."""

    values: list[int]
    counts: np.ndarray  # (C, C) int


def confusion(votes: Votes, one: int, other: int) -> Confusion:
    """Count the answers of two people to the items that both judged."""
    if one == other:
        raise ValueError(f"people: {one} twice; expected two different people")
    pair = votes.of(np.array([one, other]))
    _, first, second = pairs_of_people(pair)
    counts = np.zeros((len(votes.levels),) * 2, np.int64)
    row, column = (np.searchsorted(votes.levels, pair.values[side]) for side in (first, second))
    np.add.at(counts, (row, column), 1)
    return Confusion(votes.levels.tolist(), counts if one < other else counts.T)


def with_others(votes: Votes) -> np.ndarray:
    """(N,): for each vote the share of the others on its item that say the same; nan where nobody else voted."""
    _, item = np.unique(votes.items, return_inverse=True)
    same = votes.table[item, np.searchsorted(votes.levels, votes.values)] - 1
    others = votes.table.sum(axis=1)[item] - 1
    return np.where(others > 0, same / np.maximum(others, 1), np.nan)


@dataclass(frozen=True)
class Period:
    """Agreement with others between two times."""

    start: float
    end: float
    votes: int
    agreement: Interval


@dataclass(frozen=True)
class Drift:
    """How agreement with others went over time. `change` is from the first vote to the last, by a straight line; where
    its interval does not hold 0 the person, or the guideline's reading, has changed."""

    periods: list[Period]
    change: Interval | None  # None from fewer than 8 items


def drift(votes: Votes, times: np.ndarray, person: int | None = None, periods: int = 4, seed: int = 0) -> Drift:
    """Follow a person's agreement with the others (or everybody's) over `periods` of as many votes each.

    Args:
        votes: of everybody.
        times: (N,) of each vote, in any unit.
        person: whose votes are followed; None: all.
        periods: at most so many; fewer where there are few votes.
        seed: of the bootstrap over items.
    """
    _one_length(items=votes.items, times=times)
    same = with_others(votes)
    kept = ~np.isnan(same) & (True if person is None else votes.people == person)
    order = np.flatnonzero(kept)[np.argsort(np.asarray(times)[kept], kind="stable")]
    found = []
    for part in np.array_split(order, max(1, periods)):
        if len(np.unique(votes.items[part])) > 1:
            agreement = clustered_share(same[part], votes.items[part])
            found.append(Period(float(times[part[0]]), float(times[part[-1]]), len(part), agreement))
    if len(np.unique(votes.items[order])) < 8:
        return Drift(found, None)
    place = np.linspace(-0.5, 0.5, len(order))
    # A slope is the mean of these, to which every item brings its own part.
    parts = (same[order] - same[order].mean()) * place / (place**2).mean()
    return Drift(found, clustered_bootstrap(parts, votes.items[order], resamples=2000, seed=seed))


@dataclass(frozen=True)
class Leaning:
    """What a person's votes follow besides the pairs, in log-odds."""

    side: Interval  # of the right response, where both are as long
    length: Interval  # for each deviation by which a response is the longer
    others: Interval | None  # for the others' votes, where given: what the pair itself is worth


def leaning(sides: np.ndarray, longer: np.ndarray, others: np.ndarray | None = None, level: float = 0.95) -> Leaning:
    """Logistic regression of a person's votes on the difference in length, with the lean to a side as its constant.

    Longer responses may be better ones: with `others` the length counts for what it adds to their votes. A few others'
    votes do not hold all of a pair's worth, so compare people with each other before calling a length a bias.

    Args:
        sides: (N,) -1, 0 or 1; a tie is half a vote for each side.
        longer: (N,) by how much the right response is longer, in any unit.
        others: (N,) mean of the others' sides, as this person saw the pair, 0 where nobody else voted.
        level: coverage of the intervals.
    """
    columns = {"longer": np.asarray(longer, float)}
    if others is not None:
        columns["others"] = np.asarray(others, float)
    _one_length(sides=sides, **columns)
    # Scaled and not centred, so that the constant stays the lean between responses of one length.
    scaled = [column / (math.sqrt(float((column**2).sum() / max(1, len(sides)))) or 1.0) for column in columns.values()]
    found = logistic((1 + np.asarray(sides)) / 2, np.stack([np.ones(len(sides)), *scaled], axis=1), level)
    return Leaning(found[0], found[1], found[2] if others is not None else None)


def speed(agrees: np.ndarray, seconds: np.ndarray, level: float = 0.95) -> Interval:
    """By how much agreement with others (N,) (0 to 1; nan: unknown) rises, in log-odds, for each deviation of the
    logarithm of the time taken. Above 0: hasty votes are worse. Below: hard pairs take long, which is no fault."""
    _one_length(agrees=agrees, seconds=seconds)
    if not (np.asarray(seconds) > 0).all():
        raise ValueError(f"seconds: {np.min(seconds)} came; expected times above 0")
    known = ~np.isnan(agrees)
    time = np.log(np.asarray(seconds, float)[known])
    time = (time - time.mean()) / time.std() if len(time) and np.ptp(time) > 0 else np.zeros(len(time))
    return logistic(np.asarray(agrees)[known], np.stack([np.ones(len(time)), time], axis=1), level)[1]


def logistic(outcomes: np.ndarray, features: np.ndarray, level: float = 0.95) -> list[Interval]:
    """Weights of a logistic regression with intervals, at the maximum of likelihood times a Gaussian prior.

    Args:
        outcomes: (N,) from 0 to 1; one half counts half for each.
        features: (N, K), scaled so that a weight of PRIOR is a strong one.
        level: coverage, from the curvature at the maximum.
    """
    weights = np.zeros(features.shape[1])
    precision = np.eye(features.shape[1]) / PRIOR**2
    if not len(outcomes):
        raise ValueError("votes: none came; expected at least one")
    for _ in range(50):
        p = sigmoid(features @ weights)
        curvature = (features * (p * (1 - p))[:, None]).T @ features + precision
        step = np.linalg.solve(curvature, features.T @ (outcomes - p) - precision @ weights)
        weights = weights + step * min(1.0, 4 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    half = NormalDist().inv_cdf((1 + level) / 2) * np.sqrt(np.linalg.inv(curvature).diagonal())
    return [Interval(float(w), float(w - h), float(w + h)) for w, h in zip(weights, half, strict=True)]


def _shares(people: np.ndarray, right: np.ndarray) -> dict[int, Interval]:
    names, row = np.unique(people, return_inverse=True)
    counts = zip(names.tolist(), np.bincount(row, right), np.bincount(row), strict=True)
    return {name: wilson(float(yes), int(of)) for name, yes, of in counts}


def _one_length(**arrays: np.ndarray | Sequence[float]) -> None:
    lengths = {name: np.shape(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1 or any(len(shape) != 1 for shape in lengths.values()):
        raise ValueError(f"votes: {lengths} came; expected (N,) of each")
