"""Confidence sequences: what may be looked at after every vote errs no more often than it says."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from rlhf_fast.statistics.sequential import (
    Progress,
    decided,
    enough_for_width,
    enough_to_decide,
    mean_sequence,
    share_sequence,
)


def least_deciding(most: int) -> np.ndarray:
    """(most + 1,): from how many wins on it is decided, of each number of votes; beyond them where never."""
    found = np.arange(most + 1) + 1
    for votes in range(1, most + 1):
        wins = [w for w in (votes // 2 + 1, votes) if decided(w, votes)]
        if wins:
            low, high = votes // 2, votes
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if decided(middle, votes) else (middle, high)
            found[votes] = high
    return found


def false_decisions(votes: np.ndarray) -> float:
    """(R, N) of 0, 0.5 and 1 -> the share of runs in which 1/2 is refuted after any of the votes."""
    wins = np.cumsum(votes, axis=1)
    count = np.arange(1, votes.shape[1] + 1)
    least = least_deciding(votes.shape[1])[1:]
    # Of a tie, the mirror image is at the same height; between two whole numbers the greater decides.
    return float((np.maximum(wins, count - wins) >= least).any(axis=1).mean())


def test_one_half_is_refuted_falsely_in_at_most_5_of_100_who_look_after_every_vote() -> None:
    rng = np.random.default_rng(0)
    share = false_decisions(rng.integers(0, 2, (4000, 2000)).astype(float))
    assert 0.02 < share <= 0.05  # and it is no bound that nothing comes near


def test_what_tests_by_z_does_err() -> None:
    """The reason for sequences, and a check that the simulation sees errors."""
    wins = np.cumsum(np.random.default_rng(0).integers(0, 2, (1000, 1000)), axis=1)[:, 49::50]
    count = np.arange(50, 1001, 50)
    z = np.abs(2 * wins - count) / np.sqrt(count)
    assert 0.2 < (z > 1.96).any(axis=1).mean() < 0.3


def test_ties_and_means_of_several_votes_err_less() -> None:
    rng = np.random.default_rng(1)
    assert false_decisions(rng.integers(0, 3, (1000, 1000)) / 2) <= 0.03
    assert false_decisions(np.round(rng.integers(0, 2, (1000, 1000, 3)).mean(axis=2) * 3) / 3) <= 0.03


def test_the_deciding_votes_are_as_published() -> None:
    """Medians of 183 votes at a true share of 60 %, and 53 at 70 %, for a mixture over Beta(10, 10)."""
    rng = np.random.default_rng(2)
    least = least_deciding(1500)[1:]
    for share, median in ((0.6, 183), (0.7, 53)):
        wins = np.cumsum(rng.random((800, 1500)) < share, axis=1)
        first = (wins >= least).argmax(axis=1) + 1
        assert np.median(first) == pytest.approx(median, rel=0.15)


@pytest.mark.parametrize("share", [0.03, 0.3, 0.9])
def test_the_interval_holds_the_truth_at_every_size(share: float) -> None:
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(60):
        wins = np.cumsum(rng.random(300) < share)
        missed += any(decided(float(wins[n - 1]), n, share) for n in range(1, 301))
    assert missed / 60 <= 0.1


def test_the_interval_and_the_decision_are_one() -> None:
    rng = random.Random(0)
    for _ in range(200):
        votes = rng.randrange(1, 500)
        wins = rng.randrange(votes + 1)
        found = share_sequence(wins, votes)
        assert 0 <= found.low <= found.mean <= found.high <= 1
        assert decided(wins, votes) == (not found.low < 0.5 < found.high)
        mirrored = share_sequence(votes - wins, votes)
        assert mirrored.low == pytest.approx(1 - found.high, abs=1e-9)
    assert share_sequence(0, 50).low == 0 and share_sequence(50, 50).high == 1
    assert (share_sequence(0, 0).low, share_sequence(0, 0).high) == (0, 1)


def test_the_ratio_is_the_integral_that_it_stands_for() -> None:
    p, wins, votes = 0.5, 13, 20
    q = (np.arange(200_000) + 0.5) / 200_000
    density = q**9 * (1 - q) ** 9
    density /= density.mean()
    ratio = float((density * (q / p) ** wins * ((1 - q) / (1 - p)) ** (votes - wins)).mean())
    for level in (0.3, 0.4, 0.5, 0.6):
        assert decided(wins, votes, p, level) == (ratio >= 1 / (1 - level))


def test_enough_or_about_so_many_more() -> None:
    assert str(enough_to_decide(80, 100)) == "enough votes"
    early = enough_to_decide(65, 120)
    assert not early.enough and early.more is not None
    assert str(early) == f"about {early.more} more votes"
    likely = 65 + 67 / 124 * early.more  # who goes on at the share so far has decided then, and not long before
    assert decided(likely, 120 + early.more) and not decided(likely - 67 / 124 * 2, 118 + early.more)
    assert enough_to_decide(50, 100) == Progress(share_sequence(50, 100), 100, False, None)
    assert str(enough_to_decide(50, 100)) == "too near to decide"
    assert enough_to_decide(1, 1).more > 20  # type: ignore[operator]
    assert enough_to_decide(0, 0).more is None


def test_the_forecast_is_too_small_for_two_in_five() -> None:
    """Of true shares from 30 to 70 %, asked after 60 votes: how often it takes more than was said."""
    rng = np.random.default_rng(5)
    least, count = least_deciding(3000)[1:], np.arange(1, 3001)
    wins = np.cumsum(rng.random((300, 3000)) < rng.uniform(0.3, 0.7, (300, 1)), axis=1)
    hit = np.maximum(wins, count - wins) >= least
    first = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 10**9)
    more = [
        at - 60 > (enough_to_decide(int(w), 60).more or 10**8)
        for w, at in zip(wins[:, 59], first, strict=True)
        if at > 60
    ]
    assert len(more) > 200 and 0.25 < np.mean(more) < 0.5


def test_votes_for_a_width() -> None:
    wide = enough_for_width(60, 100, 0.05)
    assert not wide.enough and wide.more is not None
    assert enough_for_width(0.6 * (100 + wide.more), 100 + wide.more, 0.05).enough
    assert not enough_for_width(0.6 * (97 + wide.more), 97 + wide.more, 0.05).enough
    assert enough_for_width(0, 0, 0.2).more is not None


def test_means_of_several_votes_are_held_and_narrower() -> None:
    """300 prompts of five votes each, all alike: their mean varies less than a vote, and the interval is narrower."""
    rng = np.random.default_rng(6)
    missed, widths = 0, []
    for _ in range(100):
        values = (rng.random((300, 5)) < 0.6).mean(axis=1)
        missed += any(not _holds(mean_sequence(values[:n]), 0.6) for n in (10, 30, 100, 300))
        ours, other = mean_sequence(values), share_sequence(float(values.sum()), 300)
        widths.append((ours.high - ours.low) / (other.high - other.low))
    assert missed <= 10
    assert np.mean(widths) < 0.75
    assert mean_sequence([]).high == 1
    same = mean_sequence(np.ones(2000))
    assert same.low > 0.99 and same.high == 1


def test_means_under_peeking_at_every_prompt() -> None:
    """The bets against 1/2 by themselves, vectorised over runs: at most 5 % ever win twenty times their stake."""
    from rlhf_fast.statistics.sequential import _stakes

    rng = np.random.default_rng(7)
    values = rng.integers(0, 2, (1000, 1000, 3)).mean(axis=2)
    ever = 0
    for row in values:
        stakes = np.minimum(_stakes(row, 0.05), 1.0)
        up, down = (np.cumsum(np.log1p(sign * stakes * (row - 0.5))) for sign in (1, -1))
        ever += bool((np.maximum(up, down) + math.log(0.5) >= math.log(20)).any())
    assert 0 < ever <= 50


def _holds(interval: object, value: float) -> bool:
    return interval.low <= value <= interval.high  # type: ignore[attr-defined]


def test_what_cannot_be_right_is_refused() -> None:
    with pytest.raises(ValueError, match="wins and votes: 5 and 3 came; expected 0 <= wins <= votes"):
        share_sequence(5, 3)
    with pytest.raises(ValueError, match="level: 1 is outside"):
        decided(1, 3, level=1)
    with pytest.raises(ValueError, match="share: 0 came; expected a number between 0 and 1"):
        decided(1, 3, share=0)
    with pytest.raises(ValueError, match=r"half_width: 5 came; expected a share between 0 and 0\.5"):
        enough_for_width(1, 3, 5)
    with pytest.raises(ValueError, match=r"values: \(1,\) came; expected \(N,\) numbers from 0 to 1"):
        mean_sequence([2])
