"""Whether enough was judged, by intervals that may be looked at after every vote.

An ordinary interval is valid at a size fixed beforehand: who tests 50 % by z after every 50 votes up to 1,000 finds a
false winner in a quarter of cases. A confidence sequence holds the truth at all sizes at once, so that a collection may
stop whenever it is narrow enough.

All of them assume independent values, so that a prompt counts once: of several votes on a prompt, give their mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_fast.statistics.intervals import Interval

PRIOR = 10.0  # of the mixture, Beta(10, 10): narrowest for some hundred votes near one half
MOST = 1_000_000  # votes; who would need more is told that it cannot be decided


@dataclass(frozen=True)
class Progress:
    """How far a collection has come: its share so far, and whether that is enough."""

    interval: Interval
    votes: float
    enough: bool
    more: int | None  # about as many votes are still needed if the share stays; None: over a million

    def __str__(self) -> str:
        if self.enough:
            return "enough votes"
        return "too near to decide" if self.more is None else f"about {self.more} more votes"


def share_sequence(wins: float, votes: float, level: float = 0.95) -> Interval:
    """The share of wins with an interval that holds the true share at every number of votes, `level` of the time.

    The mixture over Beta(10, 10) of likelihood ratios against a share p is a martingale if p is true, so that it ever
    passes 1 / (1 - level) at most 1 - level of the time (Ville). Ratios of this form remain below a martingale for any
    independent values from 0 to 1 of mean p, by convexity; so ties count half, and a prompt judged by several counts as
    the mean of its votes. That mean varies less than one vote does, which `mean_sequence` uses and this does not.

    Args:
        wins: sum of the values: 1 for a win, 0 for a loss, 0.5 for a tie.
        votes: how many values.
        level: coverage, between 0 and 1.
    """
    _check(wins, votes, level)
    if not votes:
        return Interval(0.5, 0.0, 1.0)
    share = wins / votes
    limit = -math.log(1 - level)

    def refuted(p: float) -> bool:
        return _log_ratio(wins, votes, p) >= limit

    return Interval(share, _border(refuted, share, 0.0), _border(refuted, share, 1.0))


def decided(wins: float, votes: float, share: float = 0.5, level: float = 0.95) -> bool:
    """Whether the votes so far refute that the true share is `share`. It may be asked after every vote."""
    _check(wins, votes, level)
    if not 0 < share < 1:
        raise ValueError(f"share: {share} came; expected a number between 0 and 1")
    return _log_ratio(wins, votes, share) >= -math.log(1 - level)


def enough_to_decide(wins: float, votes: float, share: float = 0.5, level: float = 0.95) -> Progress:
    """Whether it is decided that the true share is above or below `share`, or about how many more votes that takes.

    The forecast takes the share so far for the true one, drawn towards one half by four votes, so that early luck does
    not promise too much. In simulation some two in five collections need more than it says.
    """
    now = decided(wins, votes, share, level)
    likely = (wins + 2) / (votes + 4)

    def would_do(size: int) -> bool:
        return decided(wins + likely * (size - votes), size, share, level)

    return _progress(wins, votes, level, now, would_do)


def enough_for_width(wins: float, votes: float, half_width: float, level: float = 0.95) -> Progress:
    """Whether the interval reaches no farther than `half_width` to either side, or about how many more votes that takes
    if the share stays."""
    if not 0 < half_width < 0.5:
        raise ValueError(f"half_width: {half_width} came; expected a share between 0 and 0.5 (0.05 is usual)")

    def would_do(size: int) -> bool:
        found = share_sequence(wins * size / votes if votes else size / 2, size, level)
        return max(found.high - found.mean, found.mean - found.low) <= half_width

    now = votes >= 1 and would_do(int(votes))
    return _progress(wins, votes, level, now, would_do)


def mean_sequence(values: Sequence[float] | np.ndarray, level: float = 0.95, steps: int = 1000) -> Interval:
    """The mean of values from 0 to 1, in the order in which they came, with an interval that holds at every size.

    For prompts with several votes each: give a prompt's mean. Bets on and against every mean of a grid, each of a size
    that depends on the values before alone, are martingales under that mean (Waudby-Smith and Ramdas, arXiv:2010.09686,
    hedged capital). Unlike `share_sequence` it becomes the narrower the less the values vary.

    Args:
        values: (N,) from 0 to 1, in order.
        level: coverage, between 0 and 1.
        steps: of the grid of means; the ends are moved outwards to it.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not ((x >= 0) & (x <= 1)).all():
        raise ValueError(f"values: {x.shape} came; expected (N,) numbers from 0 to 1")
    _check(0, 0, level)
    if not len(x):
        return Interval(0.5, 0.0, 1.0)
    means = (np.arange(steps) + 0.5) / steps  # (M,)
    up, down = np.zeros(steps), np.zeros(steps)  # log of what a bet on a greater, and on a smaller mean has become
    stakes = _stakes(x, 1 - level)
    for value, stake in zip(x, stakes, strict=True):
        up += np.log1p(np.minimum(stake, 0.5 / means) * (value - means))
        down += np.log1p(-np.minimum(stake, 0.5 / (1 - means)) * (value - means))
    held = means[np.maximum(up, down) + math.log(0.5) < -math.log(1 - level)]
    mean = float(x.mean())
    if not len(held):  # narrower than the grid
        return Interval(mean, max(0.0, mean - 1 / steps), min(1.0, mean + 1 / steps))
    low, high = held.min() - 0.5 / steps, held.max() + 0.5 / steps
    return Interval(mean, min(mean, max(0.0, float(low))), max(mean, min(1.0, float(high))))


def _stakes(x: np.ndarray, error: float) -> np.ndarray:
    """(N,): what is bet on each value, from the variance of those before it."""
    count = np.arange(1, len(x) + 1)
    means = (0.5 + np.cumsum(x)) / (count + 1)
    variances = (0.25 + np.cumsum((x - means) ** 2)) / (count + 1)
    before = np.concatenate([[0.25], variances[:-1]])
    stakes: np.ndarray = np.sqrt(2 * math.log(2 / error) / (before * count * np.log(count + 1)))
    return stakes


def _log_ratio(wins: float, votes: float, p: float) -> float:
    """Log of the mixture's likelihood over that of the share p."""
    losses = votes - wins
    if (wins and not p) or (losses and p == 1):
        return math.inf
    against = (wins * math.log(p) if wins else 0.0) + (losses * math.log1p(-p) if losses else 0.0)
    return _log_beta(PRIOR + wins, PRIOR + losses) - _log_beta(PRIOR, PRIOR) - against


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _border(refuted: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where shares begin to be refuted on the way from the observed share out, on the refuted side of rounding."""
    if not refuted(outside):
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if refuted(middle) else (middle, outside)
    return outside


def _progress(wins: float, votes: float, level: float, now: bool, would_do: Callable[[int], bool]) -> Progress:
    """Find the least number of votes that would do, by doubling and halving."""
    interval = share_sequence(wins, votes, level)
    if now:
        return Progress(interval, votes, True, 0)
    low, high = int(votes), max(1, 2 * int(votes))
    while not would_do(high):
        low, high = high, 2 * high
        if low > MOST:
            return Progress(interval, votes, False, None)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if would_do(middle) else (middle, high)
    return Progress(interval, votes, False, max(1, math.ceil(high - votes)))


def _check(wins: float, votes: float, level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: {level} is outside 0..1 (0.95 is usual)")
    if not 0 <= wins <= votes < math.inf:
        raise ValueError(f"wins and votes: {wins} and {votes} came; expected 0 <= wins <= votes")
