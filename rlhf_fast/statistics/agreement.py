"""How far people agree on the same items: coefficients with intervals, and what agreement lets a reward model reach.

The plain share of agreeing votes is the figure to read first. Chance-corrected coefficients stand beside it, and none
of them is a gate: balanced votes between two sides have an alpha of 2a - 1 for a raw agreement a, so that the usual
floor of 0.667 would want 83 % where well-known preference sets reach 63 to 77 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlhf_fast.statistics.intervals import Interval, clustered_share
from rlhf_fast.statistics.votes import FEW, Votes, pairs_of_people


@dataclass(frozen=True)
class Agreement:
    """A coefficient with its interval over items. `interval` is None where it is undefined: no item has two votes, or
    all votes are the same value, so that agreement by chance is complete too."""

    interval: Interval | None
    doubles: int  # items that it was measured on

    @property
    def too_few(self) -> bool:
        return self.doubles < FEW


def raw_agreement(votes: Votes, level: float = 0.95) -> Agreement:
    """The share of equal votes among the pairs of votes on an item, each item with two votes or more counting once.

    The interval is that of a share over items (Wilson's), which stays honest where all agree.
    """
    same, items = _agreeing(votes.table)
    return Agreement(clustered_share(same, items, level) if len(items) > 1 else None, len(items))


def fleiss_kappa(votes: Votes, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Agreement:
    """Fleiss's kappa (1971) for any number of votes an item. Chance agreement is by the shares of all votes, those on
    items with a single one included; with as many votes on every item this is his formula."""
    return _by_shares(votes, lambda shares: float((shares**2).sum()), level, resamples, seed)


def gwet_ac1(votes: Votes, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Agreement:
    """Gwet's AC1 (2008), which stays near the raw agreement where one value dominates and kappa and alpha fall."""
    return _by_shares(
        votes, lambda shares: float((shares * (1 - shares)).sum() / (len(shares) - 1)), level, resamples, seed
    )


def cohen_kappa(
    votes: Votes, one: int | None = None, other: int | None = None, level: float = 0.95, resamples: int = 2000,
    seed: int = 0,
) -> Agreement:  # fmt: skip
    """Cohen's kappa (1960) of two people on the items that both judged; of one, the mean over the pairs with this
    person; without names, over all pairs, each weighted by the items they share. Undefined kappas are left out."""
    if (one is None and other is not None) or (one is not None and one == other):
        raise ValueError(f"people: {one} and {other} came; expected two different people, one, or neither")
    if other is not None:
        votes = votes.of(np.array([one, other]))
    elif one is not None:
        theirs = np.isin(votes.items, votes.items[votes.people == one])
        votes = Votes(votes.items[theirs], votes.people[theirs], votes.values[theirs])
    items, first, second = pairs_of_people(votes)
    if one is not None:
        with_one = (votes.people[first] == one) | (votes.people[second] == one)
        items, first, second = items[with_one], first[with_one], second[with_one]
    people = np.unique(votes.people)
    size, count = len(votes.levels), len(people)
    pair = np.searchsorted(people, votes.people[first]) * count + np.searchsorted(people, votes.people[second])
    pairs, pair = np.unique(pair, return_inverse=True)
    row, column = (np.searchsorted(votes.levels, votes.values[side]) for side in (first, second))

    def mean(cells: np.ndarray) -> float:
        tables = cells.reshape(len(pairs), size, size)
        shared = tables.sum(axis=(1, 2))  # (P,)
        least = np.maximum(shared, 1)  # of a pair none of whose items was drawn
        observed = np.trace(tables, axis1=1, axis2=2) / least
        chance = (tables.sum(axis=1) * tables.sum(axis=2)).sum(axis=1) / least**2
        defined = (chance < 1 - 1e-12) & (shared > 0)
        kappa = (observed[defined] - chance[defined]) / (1 - chance[defined])
        return float((kappa * shared[defined]).sum() / shared[defined].sum()) if defined.any() else math.nan

    cells = (pair * size + row) * size + column
    return _bootstrap(votes, items, cells, np.ones(len(items)), len(pairs) * size**2, mean, level, resamples, seed)


def krippendorff_alpha(
    votes: Votes, metric: str = "nominal", level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Agreement:
    """Krippendorff's alpha (2018) for any number of votes an item; items with a single one do not count, as he has it.

    Args:
        votes: of any number of people.
        metric: `nominal`, `ordinal` or `interval`: what the distance of two values is.
        level: coverage of the percentile bootstrap over items.
        resamples: bootstrap draws.
        seed: the same votes and seed give the same interval.
    """
    if metric not in ("nominal", "ordinal", "interval"):
        raise ValueError(f"metric: {metric!r} came; expected nominal, ordinal or interval")
    size, counts = len(votes.levels), votes.table
    kept = np.flatnonzero(counts.sum(axis=1) > 1)
    together = counts[kept, :, None] * counts[kept, None, :]  # (I, C, C)
    together[:, np.arange(size), np.arange(size)] -= counts[kept]
    row, column, other = np.nonzero(together)
    weights = together[row, column, other] / (counts[kept].sum(axis=1)[row] - 1)

    def alpha(cells: np.ndarray) -> float:
        pairs = cells.reshape(size, size)
        totals = pairs.sum(axis=1)
        distance = _distance(metric, votes.levels, totals)
        chance = totals @ distance @ totals
        return float(1 - (totals.sum() - 1) * (pairs * distance).sum() / chance) if chance > 0 else math.nan

    return _bootstrap(votes, kept[row], column * size + other, weights, size**2, alpha, level, resamples, seed)


@dataclass(frozen=True)
class Ceiling:
    """What a model that always knew the majority would be right on, of single votes whose agreement is a.

    It is a where pairs are either clear or a toss-up, and (1 + sqrt(2a - 1)) / 2 where all are alike. Annotators'
    agreement is thus the lower bound of what a reward model can reach and not its ceiling: 73 % gives 73 to 84 %.
    """

    low: float
    high: float
    least: float  # low at the lower end of the agreement's interval
    most: float  # high at its upper end


def ceiling(agreement: Interval | float) -> Ceiling:
    """The ceiling interval of a raw agreement between two sides (ties left out), and of its interval's ends."""
    interval = agreement if isinstance(agreement, Interval) else Interval(agreement, agreement, agreement)
    for value in (interval.mean, interval.low, interval.high):
        if not 0 <= value <= 1:
            raise ValueError(f"agreement: {value} came; expected a share from 0 to 1")
    return Ceiling(interval.mean, _if_alike(interval.mean), interval.low, _if_alike(interval.high))


def _if_alike(agreement: float) -> float:
    return (1 + math.sqrt(max(0.0, 2 * agreement - 1))) / 2


def _agreeing(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each item with two votes or more: the share of equal pairs of votes, and its row in the table."""
    votes = table.sum(axis=1)
    kept = np.flatnonzero(votes > 1)
    return (table[kept] * (table[kept] - 1)).sum(axis=1) / (votes[kept] * (votes[kept] - 1)), kept


def _by_shares(
    votes: Votes, chance: Callable[[np.ndarray], float], level: float, resamples: int, seed: int
) -> Agreement:
    """(observed - chance) / (1 - chance), where chance depends on the share of each value."""
    same, kept = _agreeing(votes.table)
    size = len(votes.levels)
    row, column = np.nonzero(votes.table)
    items = np.concatenate([kept, kept, row])
    cells = np.concatenate([np.zeros(len(kept), np.int64), np.ones(len(kept), np.int64), 2 + column])
    weights = np.concatenate([same, np.ones(len(kept)), votes.table[row, column]])

    def coefficient(sums: np.ndarray) -> float:
        if not sums[1] or np.count_nonzero(sums[2:]) < 2:
            return math.nan
        expected = chance(sums[2:] / sums[2:].sum())
        return float((sums[0] / sums[1] - expected) / (1 - expected))

    return _bootstrap(votes, items, cells, weights, 2 + size, coefficient, level, resamples, seed)


def _distance(metric: str, levels: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """(C, C): the squared distance of two values; the ordinal one counts the votes between them."""
    if metric == "nominal":
        return 1.0 - np.eye(len(levels))
    places = levels.astype(np.float64) if metric == "interval" else np.cumsum(totals) - totals / 2
    distance: np.ndarray = (places[:, None] - places[None, :]) ** 2
    return distance


def _bootstrap(
    votes: Votes, items: np.ndarray, cells: np.ndarray, weights: np.ndarray, size: int,
    coefficient: Callable[[np.ndarray], float], level: float, resamples: int, seed: int,
) -> Agreement:  # fmt: skip
    """A coefficient of a table of sums, with a percentile bootstrap that draws whole items.

    Entry e adds `weights[e]` to cell `cells[e]` for each time that its item is drawn. Draws without any variation leave
    the coefficient undefined and are not counted. Where no vote differs every draw would be 1, however few: there the
    lower end is that of the raw agreement, corrected by the chance that the shares of the values give.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: {level} is outside 0..1 (0.95 is usual)")
    if resamples < 1:
        raise ValueError(f"resamples: {resamples} came, at least 1 is needed")
    same, kept = _agreeing(votes.table)
    value = coefficient(np.bincount(cells, weights, size)) if len(cells) else math.nan
    if math.isnan(value) or len(kept) < 2:
        return Agreement(None, len(kept))
    if (same == 1).all():
        chance = float(((votes.table.sum(axis=0) / votes.table.sum()) ** 2).sum())
        low = clustered_share(same, kept, level).low
        return Agreement(Interval(value, 1 - (1 - low) / (1 - chance), value), len(kept))
    names, row = np.unique(items, return_inverse=True)
    generator = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for i in range(resamples):
        times = np.bincount(generator.integers(0, len(names), len(names)), minlength=len(names))
        drawn[i] = coefficient(np.bincount(cells, weights * times[row], size))
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Agreement(Interval(value, min(value, float(low)), max(value, float(high))), len(kept))
