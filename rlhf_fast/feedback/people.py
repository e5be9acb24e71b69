"""What each annotator's votes are worth, and how two of them differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_fast.statistics.agreement import Agreement, cohen_kappa, raw_agreement
from rlhf_fast.statistics.annotators import (
    Confusion,
    Drift,
    confusion,
    drift,
    gold_accuracy,
    leaning,
    self_consistency,
    side_bias,
    speed,
    with_others,
)
from rlhf_fast.statistics.intervals import Interval, clustered_share
from rlhf_fast.statistics.votes import Votes, pairs_of_people

Vote = Mapping[str, Any]  # as `quality.counting_votes` gives it
RESAMPLES = 300  # of a bootstrap on the dashboard: its ends are steady to a hundredth or so
LEAST = 8  # items from which a lean, the effect of speed or a drift is told
MOST_PAIRS = 20  # pairs of people that the dashboard shows


@dataclass(frozen=True)
class PersonQuality:
    id: int
    name: str
    votes: int
    seconds: float  # median of a vote
    flagged: int
    left: Interval | None  # share of decided votes for the left side
    gold: Interval | None  # share of gold items answered right
    consistency: Interval | None  # share of silent repeats answered alike
    agreement: Agreement  # share of the others' votes on the same items that say the same
    length: Interval | None  # log-odds for each deviation by which a response is longer, beyond what the others say
    speed: Interval | None  # log-odds by which agreement rises for each deviation of the logarithm of the time
    drift: Drift


@dataclass(frozen=True)
class PairOfPeople:
    """Two people on the items that both judged; the values are -1 (the first response), 0 and 1."""

    one: str
    other: str
    raw: Agreement
    kappa: Agreement
    confusion: Confusion


def answer(vote: Vote) -> int:
    """Which response a vote prefers, in the order of the pair."""
    return int(np.sign(vote["preference"]))


def table_of(votes: Sequence[Vote], value: Callable[[Vote], int] = answer) -> Votes:
    columns = [[vote["pair"] for vote in votes], [vote["person"] for vote in votes], [value(vote) for vote in votes]]
    return Votes(*(np.array(column, np.int64) for column in columns))


def people_of(
    names: Sequence[tuple[int, str]], votes: Sequence[Vote], longer: Mapping[int, int]
) -> list[PersonQuality]:
    """The figures of each person.

    Args:
        names: number and name of each.
        votes: all that count, of every kind.
        longer: of each pair, by how many characters the second response is the longer one.
    """
    normal = [vote for vote in votes if vote["kind"] == "normal"]
    table, times = table_of(normal), np.array([vote["at"] for vote in normal])
    same = with_others(table) if normal else np.zeros(0)
    return [_person(number, name, votes, normal, table, times, same, longer) for number, name in names]


def _person(
    number: int, name: str, votes: Sequence[Vote], normal: Sequence[Vote], table: Votes, times: np.ndarray,
    same: np.ndarray, longer: Mapping[int, int],
) -> PersonQuality:  # fmt: skip
    mine = [vote for vote in votes if vote["person"] == number]
    rows = np.flatnonzero(table.people == number)
    own = {normal[row]["pair"]: normal[row] for row in rows.tolist()}
    known = [vote for vote in mine if vote["gold"] is not None]
    again = [(own[vote["pair"]], vote) for vote in mine if vote["kind"] == "repeat" and vote["pair"] in own]
    shared = rows[~np.isnan(same[rows])]
    compared = [normal[row] for row in shared.tolist()]  # with others
    items = table.items[shared]
    enough = len(shared) >= LEAST

    def of_one(function: Callable[..., dict[int, Interval]], *columns: list[int]) -> Interval | None:
        if not columns[0]:
            return None
        arrays = [np.array(column, np.int64) for column in columns]
        return function(np.full(len(arrays[0]), number), *arrays).get(number)

    return PersonQuality(
        id=number,
        name=name,
        votes=len(own),
        seconds=float(np.median([vote["seconds"] for vote in mine])) if mine else 0.0,
        flagged=sum(bool(vote["flags"]) for vote in mine),
        left=of_one(side_bias, [answer(vote) * _sign(vote) for vote in mine]),
        gold=of_one(gold_accuracy, [answer(vote) for vote in known], [vote["gold"] for vote in known]),
        consistency=of_one(self_consistency, [answer(one) for one, _ in again], [answer(two) for _, two in again]),
        agreement=Agreement(clustered_share(same[shared], items) if len(items) > 1 else None, len(items)),
        length=_length(compared, table, longer) if enough else None,
        speed=_speed(same[shared], [vote["seconds"] for vote in compared]) if enough else None,
        drift=drift(table, times, number),
    )


def _length(mine: Sequence[Vote], table: Votes, longer: Mapping[int, int]) -> Interval:
    """What longer responses gain with this person beyond what the others' votes say of the same pairs."""
    totals, counts = (dict(zip(*_by_item(table, of), strict=True)) for of in (table.values, np.ones(len(table.values))))
    sign = np.array([_sign(vote) for vote in mine])
    own = np.array([answer(vote) for vote in mine])
    others = [(totals[vote["pair"]] - said) / (counts[vote["pair"]] - 1) for vote, said in zip(mine, own, strict=True)]
    lengths = np.array([longer[vote["pair"]] for vote in mine])
    return leaning(own * sign, lengths * sign, np.array(others) * sign).length


def _by_item(table: Votes, values: np.ndarray) -> tuple[list[int], list[float]]:
    items, row = np.unique(table.items, return_inverse=True)
    return items.tolist(), np.bincount(row, values).tolist()


def _speed(same: np.ndarray, seconds: Sequence[float]) -> Interval | None:
    """Votes without a time, as a browser without scripts sends them, are left out."""
    timed = np.array(seconds) > 0
    return speed(same[timed], np.array(seconds)[timed]) if timed.sum() >= LEAST else None


def pairs_of(names: Mapping[int, str], votes: Sequence[Vote]) -> list[PairOfPeople]:
    """Of the pairs of people who share two items or more: those that agree least, at most twenty."""
    table = table_of([vote for vote in votes if vote["kind"] == "normal"])
    _, first, second = pairs_of_people(table)
    counts: dict[tuple[int, int], list[bool]] = {}
    same = table.values[first] == table.values[second]
    for one, other, alike in zip(table.people[first].tolist(), table.people[second].tolist(), same, strict=True):
        counts.setdefault((one, other), []).append(bool(alike))
    least = sorted((sum(alike) / len(alike), pair) for pair, alike in counts.items() if len(alike) > 1)
    found = [pair for _, pair in least][:MOST_PAIRS]
    return [
        PairOfPeople(
            names[one], names[other], raw_agreement(table.of(np.array([one, other]))),
            cohen_kappa(table, one, other, resamples=RESAMPLES), confusion(table, one, other),
        )
        for one, other in found
    ]  # fmt: skip


def _sign(vote: Vote) -> int:
    """Turns an answer into the sides that the person saw, or back."""
    return -1 if vote["swapped"] else 1
