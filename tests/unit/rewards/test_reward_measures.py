"""The figures of a reward model: worked out by hand on small tables, and with nothing to say where nothing is known."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data.records import Comparison
from rlhf_fast.rewards.measures import (
    Heldout,
    agrees,
    contradictory,
    correlation,
    histogram,
    judge,
    measure,
    people_figures,
    ranges,
)
from rlhf_fast.statistics.intervals import Interval, clustered_share


def heldout(pairs: list[tuple[float, float, int, int]], **labels: list[Any]) -> Heldout:
    """(chosen score, rejected score, chosen tokens, rejected tokens) of pairs, each of a prompt of its own."""
    rows = [
        Comparison(f"p{i}", f"c{i}", f"r{i}", **{name: values[i] for name, values in labels.items()})
        for i in range(len(pairs))
    ]
    scores = np.array([score for pair in pairs for score in pair[:2]])
    return Heldout(
        comparisons=rows,
        prompts=np.arange(len(rows)),
        chosen=2 * np.arange(len(rows)),
        rejected=2 * np.arange(len(rows)) + 1,
        scores=scores,
        by_head=scores[:, None],
        tokens=np.array([length for pair in pairs for length in pair[2:]]),
    )


# Right and longer; wrong and longer; right and shorter; a tie of two that are as long as each other.
FOUR = [(2.0, 1.0, 9, 5), (0.0, 3.0, 8, 4), (1.0, 0.0, 3, 7), (1.0, 1.0, 6, 6)]


def test_agreement_and_length_are_those_worked_out_by_hand() -> None:
    found = measure(heldout(FOUR), heldout(FOUR).comparisons)
    assert found["accuracy"]["mean"] == 2.5 / 4
    length = found["length"]
    assert length["always_longer"]["mean"] == 2.5 / 4
    assert length["beyond_longer"]["mean"] == 0.0
    assert [length[f"chosen_{name}"]["comparisons"] for name in ("longer", "shorter", "same")] == [2, 1, 1]
    assert length["chosen_longer"]["accuracy"]["mean"] == 0.5
    assert length["chosen_shorter"]["accuracy"] == {"mean": 1.0, "low": None, "high": None}  # one prompt: no interval
    assert length["difference_correlation"] == pytest.approx(np.corrcoef([1, -3, 1, 0], [4, 4, -4, 0])[0, 1])


def test_tables_are_by_label_and_range_and_left_out_where_all_is_one() -> None:
    labels = {"category": ["b", "a", "b", ""], "margin": [0.0, 2.0, 2.0, 10.0], "split": ["test"] * 4}
    by = measure(heldout(FOUR, **labels), heldout(FOUR).comparisons)["by"]
    assert list(by) == ["category", "margin", "score_difference"]
    assert [(row["name"], row["comparisons"], row["accuracy"]["mean"]) for row in by["category"]] == [
        ("a", 1, 0.0), ("b", 2, 1.0), ("none", 1, 0.5),
    ]  # fmt: skip
    assert [row["name"] for row in by["margin"]] == ["0", "2", "10"]  # by size, not by spelling
    assert [row["name"] for row in by["score_difference"]] == ["0", "1", "3"]


def test_many_values_are_cut_into_ranges_that_hold_them_all() -> None:
    values = np.array([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0])
    labels = ranges(values)
    assert sorted(set(labels)) == ["1 to 2", "3 to 4", "5 to 6", "7 to 8"]
    assert labels[0] == "5 to 6" and labels[1] == "1 to 2"
    assert len(set(ranges(np.array([0.0] * 50 + list(np.arange(1.0, 9.0)))))) <= 4  # most are equal: fewer ranges


@pytest.mark.parametrize(
    ("accuracy", "beyond", "prompts", "verdict", "said"),
    [
        (Interval(0.75, 0.72, 0.78), 0.05, 100, "aim reached", []),
        (Interval(0.75, 0.65, 0.85), 0.05, 100, "aim reached", ["below the aim"]),
        (Interval(0.65, 0.61, 0.70), 0.05, 100, "below the aim", []),
        (Interval(0.65, 0.55, 0.70), 0.05, 100, "below the aim", ["below the gate"]),
        (Interval(0.65, 0.45, 0.85), 0.05, 100, "below the aim", ["no better than a coin"]),
        (Interval(0.75, 0.72, 0.78), -0.01, 100, "aim reached", ["always choosing the longer"]),
        (Interval(0.75, 0.72, 0.78), 0.05, 3, "too few to tell", ["3 held-out prompts are too few"]),
        (clustered_share([1.0] * 8, range(8)), 0.05, 8, "too few to tell", ["the gate", "8 held-out prompts are too"]),
        (Interval(0.75, 0.58, 0.85), 0.05, 40, "too few to tell", ["below the gate"]),
        (Interval(0.59, 0.55, 0.63), 0.05, 100, "do not train on it", []),
        (Interval(0.40, 0.30, 0.50), -0.2, 2, "do not train on it", ["coin", "longer", "2 held-out prompts"]),
    ],
)
def test_the_verdict_heeds_the_interval_and_the_length(
    accuracy: Interval, beyond: float, prompts: int, verdict: str, said: list[str]
) -> None:
    found, notes = judge(accuracy, {"beyond_longer": {"low": beyond}}, prompts)
    assert found == verdict and len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes, strict=True))


def test_calibration_is_of_the_response_that_scores_higher() -> None:
    pairs = [(math.log(3), 0.0, 5, 5)] * 30 + [
        (0.0, math.log(3), 5, 5)
    ] * 10  # three quarters sure, and right on 3 of 4
    found = measure(heldout(pairs), heldout(pairs).comparisons)["calibration"]
    assert found["ece"] == pytest.approx(0.0, abs=1e-9)
    assert found["brier"] == pytest.approx(0.75 * 0.25**2 + 0.25 * 0.75**2)
    assert found["temperature"] == pytest.approx(1.0, rel=1e-6)
    (only,) = found["bins"]  # equal predictions are never parted
    assert (only["count"], only["predicted"], only["observed"]) == (40, pytest.approx(0.75), 0.75)


def test_scores_that_never_differ_are_ties_with_nothing_to_correlate() -> None:
    flat = [(1.0, 1.0, 4, 4)] * 3
    found = measure(heldout(flat), heldout(flat).comparisons)
    assert found["accuracy"]["mean"] == 0.5 and found["by"] == {}
    assert found["length"]["score_correlation"] is None and found["calibration"]["temperature"] is None
    assert found["calibration"]["brier"] == 0.25 and found["calibration"]["ece"] == 0.0
    assert found["length"]["chosen_longer"]["accuracy"] is None  # no such comparison
    json.dumps(found, allow_nan=False)


def test_heads_that_are_at_one_and_divided_are_told_apart() -> None:
    scores = np.array([[2.0, 1.0], [0.0, 0.0], [1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [3.0, 1.0]])  # (N, K)
    one = heldout([(1.5, 0.0, 1, 1), (0.1, 0.0, 1, 1), (0.0, 2.0, 1, 1)])
    found = measure(Heldout(**{**one.__dict__, "by_head": scores}), one.comparisons)["heads"]
    assert found["accuracies"] == pytest.approx([2 / 3, 1 / 3])
    assert (found["at_one"]["comparisons"], found["divided"]["comparisons"]) == (2, 1)
    assert found["at_one"]["accuracy"]["mean"] == 0.5
    assert found["disagreement"] == pytest.approx(scores.std(axis=1).mean() / one.scores.std())
    assert measure(one, one.comparisons)["heads"] is None


# People --------------------------------------------------------------------------------------------------------------


def vote(prompt: str, chosen: str, rejected: str, annotator: str) -> Comparison:
    return Comparison(prompt, chosen, rejected, annotator=annotator)


def test_agreement_is_of_different_named_annotators_on_the_same_pair() -> None:
    votes = [
        vote("p", "a", "b", "eva"), vote("p", "a", "b", "tom"), vote("p", "b", "a", "uli"),  # 1 of 3 pairs of votes
        vote("q", "a", "b", "eva"), vote("q", "a", "b", "tom"),
        vote("q", "a", "c", "eva"), vote("q", "a", "c", "eva"), vote("q", "c", "a", "eva"),  # herself: 1 of 3
        vote("r", "a", "b", ""), vote("r", "b", "a", ""), vote("r", "a", "b", "eva"),  # nobody knows who
    ]  # fmt: skip
    found = people_figures(votes)
    assert found["pairs_judged_by_several"] == 2
    assert found["agreement"]["mean"] == 0.5 and found["agreement"]["low"] is not None
    assert found["with_themselves"] == {"mean": pytest.approx(1 / 3), "low": None, "high": None}
    assert found["reach"] == [0.5, 0.5]


def test_the_reach_is_what_a_model_of_the_majority_gets_of_single_votes() -> None:
    """All pairs alike: two of three people would say the same; the ends of the interval then follow by arithmetic."""
    votes = [vote(f"p{i}", "a", "b", "eva") for i in range(20)]
    votes += [vote(f"p{i}", *(("a", "b") if i < 15 else ("b", "a")), "tom") for i in range(20)]
    low, high = people_figures(votes)["reach"]
    assert low == 0.75 and high == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert high**2 + (1 - high) ** 2 == pytest.approx(0.75)  # two votes for the likelier side, or two against


def test_votes_behind_a_label_are_what_people_said_and_what_the_model_is_held_against() -> None:
    """Eight pairs whose label is a majority of two to one, two of one that all gave; ties say nothing."""
    split, alike = [("eva", 2.0), ("tom", 1.0), ("uli", -1.0)], [("eva", 1.0), ("tom", 3.0), ("uli", 0.0)]
    votes = [tuple(split)] * 8 + [tuple(alike)] * 2 + [(("eva", 1.0),)]
    one = heldout([FOUR[0]] * 10 + [FOUR[1]], votes=votes, annotator=["people"] * 11)
    found = measure(one, one.comparisons)
    people = found["people"]
    agreement = (8 * 1 + 2 * 1) / (8 * 3 + 2)  # equal pairs of votes, among all
    assert people["agreement"]["mean"] == pytest.approx(agreement) and people["pairs_judged_by_several"] == 10
    assert people["model_on_votes"]["mean"] == pytest.approx((8 * 2 / 3 + 2 * 1 + 0) / 11)
    assert measure(heldout(FOUR), one.comparisons)["people"]["model_on_votes"] is None


def test_more_of_the_votes_than_agreement_allows_is_noted() -> None:
    people = [(("eva", 1.0), ("tom", 1.0 if i < 60 else -1.0)) for i in range(100)]
    told = [Comparison(f"q{i}", "a", "b", votes=votes) for i, votes in enumerate(people)]  # they agree on 60 %
    right = heldout([FOUR[0]] * 100, votes=[(("eva", 1.0),)] * 100)
    notes = " ".join(measure(right, told)["notes"])
    assert "agrees with more of the votes than the" in notes and "held-out prompts among those trained on" in notes
    usual = heldout([FOUR[0]] * 60 + [FOUR[1]] * 40, votes=[(("eva", 1.0),)] * 100)
    assert "more of the votes" not in " ".join(measure(usual, told)["notes"])


def test_nothing_is_known_of_people_when_no_pair_was_judged_twice() -> None:
    found = people_figures([vote("p", "a", "b", "eva"), vote("p", "a", "c", "tom")])
    assert (found["agreement"], found["with_themselves"], found["reach"]) == (None, None, None)
    assert found["pairs_judged_by_several"] == 0 and found["contradictory"] == 0.0


def test_comparisons_on_a_cycle_are_counted_and_those_that_only_lead_there_are_not() -> None:
    cycle = [vote("p", "a", "b", ""), vote("p", "b", "c", ""), vote("p", "c", "a", "")]
    leads = [vote("p", "x", "a", ""), vote("p", "a", "y", ""), vote("q", "b", "a", "")]
    assert contradictory([*cycle, *leads]) == 3
    assert contradictory([vote("p", "a", "b", ""), vote("p", "b", "a", "")]) == 2
    assert contradictory(leads) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda e: e[0] != e[1]), min_size=1, max_size=9))
def test_comparisons_are_on_a_cycle_just_when_a_walk_leads_back(edges: list[tuple[int, int]]) -> None:
    def leads(start: int, end: int) -> bool:
        seen, ahead = set(), [start]
        while ahead:
            here = ahead.pop()
            if here == end:
                return True
            if here not in seen:
                seen.add(here)
                ahead += [b for a, b in edges if a == here]
        return False

    rows = [vote("p", str(a), str(b), "") for a, b in edges]
    assert contradictory(rows) == sum(leads(b, a) for a, b in edges)


# Small things --------------------------------------------------------------------------------------------------------


def test_a_histogram_counts_every_score_once_in_bins_that_all_sets_share() -> None:
    found = histogram({"chosen": np.array([0.0, 1.0, 2.0]), "policy": np.array([-4.0, 2.0])}, bins=6)
    assert len(found["edges"]) == 7 and found["edges"][0] == -4.0 and found["edges"][-1] == 2.0
    assert sum(found["chosen"]) == 3 and sum(found["policy"]) == 2 and found["policy"][0] == 1


def test_correlation_is_none_without_variation() -> None:
    assert correlation(np.array([1.0, 1.0]), np.array([1.0, 2.0])) is None
    assert correlation(np.array([1.0]), np.array([1.0])) is None
    assert correlation(np.array([1.0, 2.0]), np.array([4.0, 2.0])) == pytest.approx(-1.0)


def test_a_tie_is_half_right() -> None:
    assert agrees(np.array([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]
