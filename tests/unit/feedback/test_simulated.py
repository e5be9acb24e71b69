"""The simulated annotator: it says what it is, keeps to its rule, and errs as often as it was told to."""

import itertools
import json
import math
import random
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.config import AnnotatorConfig
from rlhf_fast.data.records import read_comparisons
from rlhf_fast.feedback.simulated import WEIGHTS, Rating, SimulatedAnnotator

CATEGORIES = ("simple", "complex", "adversarial", "off_topic")
DEMONSTRATIONS = [
    json.loads(line)
    for line in (Path(__file__).resolve().parents[3] / "rlhf_fast" / "demo" / "demonstrations.jsonl")
    .read_text(encoding="utf-8")
    .split("\n")
    if line
]

PROMPT = "Could you change the phone number in the footer of our bakery website to 0161 555 0142?"
OPENING = "Thank you for asking about the phone number in the footer of your bakery website."
MIDDLE = "The change is small, and it reaches every page at once, the contact page included."
STEP = "I will publish it on Thursday and send you a picture of the page."
REPLY = f"{OPENING} {MIDDLE} {STEP}"

ANNOTATOR = SimulatedAnnotator(AnnotatorConfig(error_rate=0.0))


def rate(reply: str, category: str = "simple", prompt: str = PROMPT) -> Rating:
    return ANNOTATOR.rate(prompt, category, reply)


def lowered(worse: Rating, better: Rating) -> set[str]:
    """The criteria in which one rating is below another; in the rest they should be equal."""
    assert all(getattr(worse, name) <= getattr(better, name) for name in WEIGHTS)
    return {name for name in WEIGHTS if getattr(worse, name) < getattr(better, name)}


# What it says of itself ----------------------------------------------------------------------------------------------


def test_its_name_and_every_comparison_say_simulated_and_what_decided() -> None:
    annotator = SimulatedAnnotator(AnnotatorConfig(error_rate=0.25, seed=7))
    assert annotator.name == "simulated (seed 7, error rate 0.25, tie margin 0.05)"
    comparisons = annotator.compare_all(PROMPT, "simple", [REPLY, OPENING, "No."])
    assert len(comparisons) == 3
    assert all(comparison.as_dict()["annotator"] == annotator.name for comparison in comparisons)


def test_comparisons_carry_the_ratings_of_both_replies_and_come_back_from_a_file() -> None:
    comparison = ANNOTATOR.compare(PROMPT, "simple", OPENING, REPLY)
    assert comparison is not None
    assert (comparison.chosen, comparison.rejected) == (REPLY, OPENING)
    expected = {"chosen": rate(REPLY).as_dict(), "rejected": rate(OPENING).as_dict()}
    assert comparison.ratings == expected
    (read,) = read_comparisons([json.loads(json.dumps(comparison.as_dict()))])
    assert read.as_dict() == comparison.as_dict()


# Ratings -------------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [REPLY, STEP, "!", "maybe ", "I guarantee ", "[name] ", "$500 ", "we cannot ", "0161 ", "\n- "]
)


@settings(max_examples=60, deadline=None)
@given(
    st.text() | st.lists(PIECES | st.text(max_size=5), max_size=30).map("".join), st.text(), st.sampled_from(CATEGORIES)
)
def test_ratings_of_any_text_lie_between_0_and_1_and_repeat(reply: str, prompt: str, category: str) -> None:
    rating = ANNOTATOR.rate(prompt, category, reply)
    assert all(0.0 <= getattr(rating, name) <= 1.0 for name in WEIGHTS)
    assert 0.0 <= rating.score <= 1.0 + 1e-12
    assert rating == SimulatedAnnotator(AnnotatorConfig(error_rate=0.3, seed=5)).rate(prompt, category, reply)


def test_the_score_is_the_weighted_mean_of_the_criteria() -> None:
    assert math.isclose(sum(WEIGHTS.values()), 1.0)
    for name, weight in WEIGHTS.items():
        only = Rating(**{criterion: float(criterion == name) for criterion in WEIGHTS})
        assert math.isclose(only.score, weight)


def test_the_model_reply_of_these_tests_is_rated_best() -> None:
    assert rate(REPLY) == Rating(1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("category", CATEGORIES)
def test_demonstrations_score_above_0_8_and_above_replies_to_other_categories(category: str) -> None:
    rows = [row for row in DEMONSTRATIONS if row["category"] == category]
    own = mean(rate(row["completion"], category, row["prompt"]).score for row in rows)
    assert own > 0.8
    strangers = [row["completion"] for row in DEMONSTRATIONS if row["category"] != category]
    random.Random(0).shuffle(strangers)
    shuffled = zip(rows, itertools.cycle(strangers), strict=False)
    assert own > mean(rate(reply, category, row["prompt"]).score for row, reply in shuffled) + 0.1


def test_a_message_list_is_rated_by_what_the_client_said_in_it() -> None:
    messages = [
        {"role": "system", "content": "You answer about guitars and violins."},
        {"role": "user", "content": PROMPT},
    ]
    assert ANNOTATOR.rate(messages, "simple", REPLY) == rate(REPLY)
    guitars = "The guitars and violins are here. We will send them today."
    assert ANNOTATOR.rate(messages, "simple", guitars) == rate(guitars)


# Each criterion reacts to what it claims -----------------------------------------------------------------------------


def test_helpfulness_rises_with_a_next_step_and_again_with_its_time() -> None:
    without, untimed = rate(f"{OPENING} {MIDDLE}"), rate(f"{OPENING} {MIDDLE} {STEP.replace(' on Thursday', '')}")
    assert without.helpfulness < untimed.helpfulness < rate(REPLY).helpfulness
    assert lowered(without, untimed) == lowered(untimed, rate(REPLY)) == {"helpfulness"}


def test_helpfulness_rises_with_the_client_s_own_subject_words() -> None:
    elsewhere = f"Thank you for asking about the colour of the wall in your new kitchen. {STEP}"
    here = f"Thank you for asking about the number in the footer of your new kitchen. {STEP}"
    assert lowered(rate(elsewhere), rate(here)) == {"helpfulness"}


def test_a_boundary_is_held_in_adversarial_and_off_topic_requests() -> None:
    held = REPLY.replace(OPENING, "We cannot change the phone number in the footer of your bakery website for that.")
    for category in ("adversarial", "off_topic"):
        assert lowered(rate(REPLY, category), rate(held, category)) == {"harmlessness"}


def test_declining_a_fair_request_is_marked_down() -> None:
    declined = REPLY.replace(
        OPENING, "We cannot change the phone number in the footer of your bakery website for that."
    )
    for category in ("simple", "complex"):
        assert lowered(rate(declined, category), rate(REPLY, category)) == {"harmlessness"}


@pytest.mark.parametrize(
    "addition",
    [
        "The result is guaranteed.",
        "There is no risk in it.",
        "I have already updated it.",
        "Please ask for [name].",
        "It costs $500 in all.",
        "It takes 1,200 lines.",
        "See https://example.com for more.",
        "Write to help@example.com then.",
    ],
    ids=lambda addition: addition.split()[-2],
)
def test_honesty_falls_with_overpromises_claims_placeholders_and_invented_figures(addition: str) -> None:
    assert lowered(rate(f"{REPLY} {addition}"), rate(REPLY)) == {"honesty"}


def test_a_figure_that_the_client_gave_is_not_invented() -> None:
    assert rate(f"{REPLY} The number is 0161 555 0142.").honesty == 1.0
    assert rate(f"{REPLY} The number is 0161 555 0143.").honesty < 1.0


@pytest.mark.parametrize(
    "worse",
    [
        f"{REPLY} Perhaps it is simple.",
        f"{REPLY} I think it is simple.",
        f"{REPLY} What a lovely bakery!",
        f"{REPLY}\n- one\n- two.",
        REPLY.removesuffix("."),
        f"{REPLY} And then we",
        f"{REPLY} {MIDDLE}",
        REPLY + " It has every font you want, and it reads very well on a wide screen and on a small phone." * 4,
    ],
    ids=["perhaps", "i think", "exclamation", "list", "no full stop", "cut off", "repetition", "length"],
)
def test_style_falls_with_hedging_exclamation_lists_cut_off_ends_repetition_and_length(worse: str) -> None:
    assert lowered(rate(worse), rate(REPLY)) == {"style_fit"}


def test_a_reply_of_a_few_words_has_less_style_than_one_of_25() -> None:
    assert rate("Thank you.").style_fit < rate(MIDDLE).style_fit < rate(f"{OPENING} {MIDDLE}").style_fit == 1.0
    assert rate("").style_fit == rate("...").style_fit == 0.0


# Comparisons ---------------------------------------------------------------------------------------------------------


def pairs_of_unequal_replies(count: int) -> list[tuple[str, str, str]]:
    """(prompt, better, worse) with the better one first, all different."""
    rows = [(f"{PROMPT} Note {number}.", REPLY, f"{REPLY} Perhaps number {number}.") for number in range(count)]
    assert all(rate(better, prompt=p).score > rate(worse, prompt=p).score for p, better, worse in rows[:20])
    return rows


@pytest.mark.parametrize("error_rate", [0.1, 0.3])
def test_the_error_rate_is_met_within_four_deviations_on_2000_pairs(error_rate: float) -> None:
    annotator = SimulatedAnnotator(AnnotatorConfig(error_rate=error_rate, seed=3))
    count = 2000
    errors = 0
    for prompt, better, worse in pairs_of_unequal_replies(count):
        comparison = annotator.compare(prompt, "simple", better, worse)
        assert comparison is not None
        errors += comparison.chosen == worse
    assert abs(errors - count * error_rate) <= 4 * math.sqrt(count * error_rate * (1 - error_rate))


def test_the_order_of_two_replies_changes_nothing_errors_included() -> None:
    annotator = SimulatedAnnotator(AnnotatorConfig(error_rate=0.4, seed=1))
    wrong = 0
    for prompt, better, worse in pairs_of_unequal_replies(100):
        one, other = (
            annotator.compare(prompt, "simple", better, worse),
            annotator.compare(prompt, "simple", worse, better),
        )
        assert one is not None and one == other
        wrong += one.chosen == worse
    assert 0 < wrong < 100  # both right and wrong answers were seen


def test_seeds_err_on_different_pairs() -> None:
    def answers(seed: int) -> list[str]:
        annotator = SimulatedAnnotator(AnnotatorConfig(error_rate=0.4, seed=seed))
        comparisons = [annotator.compare(p, "simple", a, b) for p, a, b in pairs_of_unequal_replies(50)]
        return [comparison.chosen for comparison in comparisons if comparison is not None]

    assert answers(0) == answers(0) != answers(1)


@settings(max_examples=60, deadline=None)
@given(st.text(), st.sampled_from(CATEGORIES))
def test_identical_replies_are_never_told_apart(reply: str, category: str) -> None:
    assert ANNOTATOR.compare(PROMPT, category, reply, reply) is None


def test_replies_of_the_same_score_are_not_told_apart() -> None:
    twin = REPLY.replace("small", "quick")
    assert ANNOTATOR.compare(PROMPT, "simple", REPLY, twin) is None
    assert ANNOTATOR.compare_all(PROMPT, "simple", [REPLY, twin]) == []


def test_every_pair_of_distinct_replies_is_compared_once_and_empty_ones_never() -> None:
    replies = [REPLY, OPENING, "", " \n", STEP, REPLY, "No.", OPENING]
    comparisons = ANNOTATOR.compare_all(PROMPT, "simple", replies)
    found = [frozenset((comparison.chosen, comparison.rejected)) for comparison in comparisons]
    expected = [frozenset(pair) for pair in itertools.combinations([REPLY, OPENING, STEP, "No."], 2)]
    assert found == expected
    assert ANNOTATOR.compare_all(PROMPT, "simple", ["", " ", "\t"]) == []


@pytest.mark.parametrize("error_rate", [-0.01, 0.5, 1.0, math.nan])
def test_an_error_rate_out_of_range_is_refused(error_rate: float) -> None:
    with pytest.raises(ValueError, match="error_rate"):
        SimulatedAnnotator(AnnotatorConfig(error_rate=error_rate))
