"""Intervals against known answers: coverage by simulation, textbook values, and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_fast.statistics import intervals
from rlhf_fast.statistics.intervals import Interval, clustered_bootstrap, clustered_share, t_quantile


def test_an_interval_prints_and_is_stored() -> None:
    interval = Interval(0.62, 0.55, 0.69)
    assert str(interval) == "0.62 [0.55, 0.69]"
    assert interval.as_dict() == {"mean": 0.62, "low": 0.55, "high": 0.69}


def test_the_bootstrap_covers_the_true_mean() -> None:
    # 40 prompts of 4 samples, half of the variance between prompts; the true mean is 0.3. Of 200 intervals at 95 %,
    # 186 to 196 cover it nine times in ten.
    generator = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 4)
    covered = 0
    for seed in range(200):
        values = 0.3 + generator.normal(size=40)[prompts] + generator.normal(size=160)
        interval = clustered_bootstrap(values, prompts, resamples=1000, seed=seed)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_a_bootstrap_without_clusters_would_not_cover() -> None:
    # The reason for clusters: the same data with each sample as its own cluster covers far too seldom.
    generator = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 8)
    covered = 0
    for seed in range(100):
        values = generator.normal(size=40)[prompts] + 0.3 * generator.normal(size=320)
        interval = clustered_bootstrap(values, np.arange(320), resamples=500, seed=seed)
        covered += interval.low <= 0.0 <= interval.high
    assert covered / 100 < 0.8


def test_copies_of_the_samples_do_not_shrink_the_interval() -> None:
    values = np.random.default_rng(1).normal(size=30)
    once = clustered_bootstrap(values, np.arange(30))
    often = clustered_bootstrap(np.tile(values, 5), np.tile(np.arange(30), 5))
    assert often.low == pytest.approx(once.low, abs=1e-12)
    assert often.high == pytest.approx(once.high, abs=1e-12)


def test_it_agrees_with_the_standard_error_of_a_mean() -> None:
    values = np.random.default_rng(2).normal(size=400)
    interval = clustered_bootstrap(values, [f"prompt {row}" for row in range(400)])
    expected = 2 * 1.96 * values.std() / np.sqrt(400)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.05)
    assert interval.mean == pytest.approx(values.mean())


def test_a_wider_level_gives_a_wider_interval() -> None:
    values = np.random.default_rng(3).normal(size=50)
    narrow, wide = (clustered_bootstrap(values, np.arange(50), level=level) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_clusters_of_different_size_are_weighted_by_their_samples() -> None:
    # Cluster 0 has three ones, cluster 1 one zero: the draws (0,0), (0,1), (1,1) give 1, 3/4 and 0.
    interval = clustered_bootstrap([1, 1, 1, 0], ["x", "x", "x", "y"], level=0.4)
    assert interval == Interval(0.75, 0.75, 0.75)
    assert clustered_bootstrap([1, 1, 1, 0], ["x", "x", "x", "y"]) == Interval(0.75, 0.0, 1.0)


def test_same_seed_same_bits_and_another_seed_differs() -> None:
    values = np.random.default_rng(4).normal(size=40)
    first, again = (clustered_bootstrap(values, np.arange(40), seed=7) for _ in range(2))
    assert first == again
    assert clustered_bootstrap(values, np.arange(40), seed=8) != first


def test_draws_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).normal(size=40)
    whole = clustered_bootstrap(values, np.arange(40))
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 1000)
    parts = clustered_bootstrap(values, np.arange(40))
    assert parts.low == pytest.approx(whole.low, abs=0.02)
    assert parts.high == pytest.approx(whole.high, abs=0.02)


@pytest.mark.parametrize(
    ("values", "clusters", "options", "message"),
    [
        ([1.0, 2.0], ["x", "x"], {}, "at least 2 clusters"),
        ([], [], {}, "at least 2 clusters"),
        ([1.0, 2.0], ["x"], {}, "one length"),
        ([[1.0], [2.0]], ["x", "y"], {}, "one length"),
        ([1.0, float("nan")], ["x", "y"], {}, "row 1"),
        ([1.0, 2.0], ["x", "y"], {"level": 95}, "level"),
        ([1.0, 2.0], ["x", "y"], {"resamples": 0}, "resamples"),
    ],
)
def test_bad_input_is_named(values: list, clusters: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clustered_bootstrap(values, clusters, **options)


# Shares ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "degrees", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 3, 3.1824), (0.975, 7, 2.3646), (0.975, 30, 2.0423),
     (0.95, 4, 2.1318), (0.995, 9, 3.2498), (0.995, 3, 5.8409)],
)  # fmt: skip
def test_quantiles_of_students_distribution_are_the_tables(p: float, degrees: int, expected: float) -> None:
    assert t_quantile(p, degrees) == pytest.approx(expected, rel=0.01)


def test_a_share_of_many_independent_judgements_has_wilsons_interval() -> None:
    # Wilson (1927) of 7 in 10 at 95 %: 0.397 to 0.892; with as many clusters the few that there are cost little.
    found = clustered_share([1.0] * 700 + [0.0] * 300, np.arange(1000))
    assert (found.mean, found.low, found.high) == pytest.approx((0.7, 0.671, 0.728), abs=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_eight_that_agree_are_not_certain(value: float) -> None:
    found = clustered_share([value] * 8, np.arange(8))
    far = found.low if value else 1 - found.high
    assert found.mean == value and 0.55 < far < 0.65  # Clopper and Pearson (1934), too: 0.63
    again = clustered_share([value] * 24, np.repeat(np.arange(8), 3))  # three times as many of the same prompts
    assert again == found
    many = clustered_share([value] * 800, np.arange(800))
    assert (many.low if value else 1 - many.high) > 0.99


@pytest.mark.parametrize(("prompts", "each"), [(4, 6), (8, 1), (8, 6), (19, 6)])
@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
def test_the_interval_of_a_share_covers_it(prompts: int, each: int, share: float) -> None:
    """Judgements of a prompt are alike, as those of a beta-binomial whose correlation is 0.3."""
    draw, covered, resampled = np.random.default_rng(0), 0, 0
    clusters = np.repeat(np.arange(prompts), each)
    for _ in range(300):
        of_prompt = draw.beta(share * 7 / 3, (1 - share) * 7 / 3, prompts)
        values = (draw.random(prompts * each) < np.repeat(of_prompt, each)).astype(float)
        found, drawn = clustered_share(values, clusters), clustered_bootstrap(values, clusters, resamples=200)
        covered += found.low <= share <= found.high
        resampled += drawn.low <= share <= drawn.high
    assert covered >= 0.93 * 300, (covered, resampled)
    assert covered >= resampled


def test_ties_say_more_than_as_many_wins_and_losses() -> None:
    found = clustered_share([1.0] * 2 + [0.5] * 48, np.arange(50))
    drawn = clustered_bootstrap([1.0] * 2 + [0.5] * 48, np.arange(50))
    assert (found.low, found.high) == pytest.approx((drawn.low, drawn.high), abs=0.01)
    even = clustered_share([1.0, 0.0] * 25, np.arange(50))
    assert (even.low, even.high) == pytest.approx((0.362, 0.638), abs=1e-3)


def test_ties_count_half_and_copies_do_not_shrink_the_interval() -> None:
    values = [1.0, 0.5, 0.0, 1.0, 1.0, 0.5]
    once, often = clustered_share(values, np.arange(6)), clustered_share(values * 4, [*range(6)] * 4)
    assert once.mean == pytest.approx(4 / 6) and once.low < often.low + 0.02
    assert clustered_share(values[::-1], np.arange(6)) == once


@pytest.mark.parametrize(("values", "message"), [([1.0, 1.5], r"1\.5 is not from 0 to 1 \(row 1\)"),
                                                  ([1.0, -0.1], r"-0\.1 is not from 0 to 1")])  # fmt: skip
def test_what_is_no_share_is_named(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clustered_share(values, ["a", "b"])
