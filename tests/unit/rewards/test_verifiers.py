"""Rules for verifiable tasks: what counts as equal, what hostile responses cannot do, and how long none takes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast.rewards.rules import choice, exact, json_object, length, math_answer, rule, tags

fractions = st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**6)


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("So it is 1,000.", "1000"),
        ("1{,}000", "1e3"),
        (r"\boxed{1000}", 1000),
        ("It is 1/2", "0.5"),
        (r"\boxed{\frac{1}{2}}", "50%"),
        (r"\boxed{-\dfrac{3}{4}}", "-0.75"),
        (r"\boxed{\frac12}", "1/2"),
        (r"\boxed{\tfrac{ 10 }{ 4 }}", 2.5),
        ("first 7, then 42", "42"),
        ("**42**", "42"),
        ("x = −5", "-5"),
        ("2 - 7 = -5", -5),
        ("it costs $5.00!", "5"),
        ("he lost -$1,234.50", "-1234.5"),
        (r"\boxed{x = 5 \text{ cm}}", "5"),
        (r"\boxed{90^\circ}", "90"),
        (r"thus $\boxed{\$18}$, I also tried 3.", "18"),
        (r"\boxed{1} no: \boxed{2}", "2"),
        ("#### 72", "Natalia sold 48/2 = 24 clips.\n#### 72"),
        ("a check: 1\n#### 72\nDone in 2 steps", "#### 72"),
        ("6.02e23", "602000000000000000000000"),
        ("1.5E-3", "0.0015"),
        ("答案是5个", "5"),
        (r"\boxed{(3, 4)}", "(3,4)"),
        (r"\boxed{\text{east}}", "east"),
        (r"\boxed{\left( \dfrac{x}{2} \right)}", r"(\frac{x}{2})"),
        (r"\boxed{\{1, 2\}}", r"\{1,2\}"),
        (r"\boxed{" + "9" * 5000 + "}", "9" * 5000),
    ],
)
def test_equal_answers_are_equal(response: str, answer: Any) -> None:
    assert math_answer(response, answer) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", "5"),
        ("no number", "5"),
        ("0.3333", "1/3"),
        ("3.14", "3.14159"),
        ("50%", "50"),
        ("pages 3-5", "-5"),
        ("in CO2", "2"),
        (r"\boxed{5", "6"),
        (r"\boxed{}", "5"),
        (r"5 \boxed{6}", "5"),
        ("1/0", "0"),
        ("1e999999999", "1e999999998"),
        ("the answer is east", "east"),  # no number: needs the box
        ("1 + 1", "1+1"),
        (r"\boxed{__import__('os').getpid()}", "5"),
    ],
)
def test_other_answers_are_not(response: str, answer: Any) -> None:
    assert math_answer(response, answer) == 0.0


@given(fractions, fractions)
def test_numbers_are_compared_exactly_in_every_way_to_write_them(a: Fraction, b: Fraction) -> None:
    for wrote in (f"so {a}", rf"\boxed{{{a}}}", rf"\boxed{{\frac{{{a.numerator}}}{{{a.denominator}}}}}", f"#### {a}"):
        assert math_answer(wrote, str(a)) == 1.0
        assert math_answer(wrote, str(b)) == float(a == b)


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=4))
def test_decimals_grouped_or_scientific_or_in_percent_are_the_same_number(number: Any) -> None:
    for wrote in (f"{number:,}", f"{number:.20e}", f"{number * 100}%", f"= {number}."):
        assert math_answer(wrote, str(number)) == 1.0, wrote


@given(st.text(), st.text(min_size=1).filter(str.strip))
def test_any_texts_give_zero_or_one(response: str, answer: str) -> None:
    assert math_answer(response, answer) in (0.0, 1.0)
    assert exact(response, answer) in (0.0, 1.0)
    assert choice(response, "B") in (0.0, 1.0)
    assert math_answer(rf"\boxed{{{response}}}", "5") in (0.0, 1.0)


# The other rules -----------------------------------------------------------------------------------------------------


@given(st.text().filter(str.strip))
def test_every_text_is_exactly_itself_whatever_its_case_and_spaces(text: str) -> None:
    assert exact(text, text) == exact(f"  {text}\n", text) == exact(text, ["something else", text]) == 1.0
    assert exact(text + "x", text) == 0.0


def test_exact_does_not_count_case_width_spacing_and_a_full_stop() -> None:
    assert exact("The  Ｅiffel\ntower.", "the eiffel Tower") == 1.0
    assert exact("the eiffel tower, of course", "the eiffel tower") == 0.0
    assert exact(".", "answer") == exact("", ".") == 0.0 and exact(".", ".") == 1.0


@pytest.mark.parametrize(
    "response",
    ["B", "(b)", "B.", "**B**", "B) because", r"so \boxed{B}", r"\boxed{\text{(B)}}", "The answer is B.", "Answer: (B)",
     "A? The answer is A. No, the answer is **B**", "answer B, for A does not hold"],
)  # fmt: skip
def test_the_letter_that_was_chosen_is_found(response: str) -> None:
    assert choice(response, "B") == choice(response, "(b)") == 1.0
    assert choice(response, "A") == 0.0


@pytest.mark.parametrize("response", ["", "A banana", "Bananas", "the answer is a banana", "I think so", "A or B"])
def test_an_article_is_no_letter_that_was_chosen(response: str) -> None:
    assert [choice(response, letter) for letter in "ABI"] == [0.0, 0.0, 0.0]


def test_tags_stand_once_in_their_order_and_alone() -> None:
    names = ["think", "answer"]
    assert tags("<think>a\nb</think>\n<answer>5</answer>\n", names) == 1.0
    wrong = [
        "", "5", "<answer>5</answer><think>a</think>", "<think>a</think> so <answer>5</answer>",
        "<think>a</think><answer>5</answer> and more", "<think>a<answer>5</answer></think>", "<think>a</think>",
        "<think>a</think><answer>5</answer><answer>6</answer>", "<think></think></think><answer>5</answer>",
    ]  # fmt: skip
    assert [tags(response, names) for response in wrong] == [0.0] * len(wrong)


@given(st.dictionaries(st.text(), st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)))
def test_every_json_object_is_one_alone_or_in_a_fence(value: dict[str, Any]) -> None:
    text = json.dumps(value)
    assert json_object(text) == json_object(f"```json\n{text}\n```") == json_object(f"```\n{text}```\n") == 1.0
    assert json_object(text, [*value]) == 1.0
    assert json_object(text[:-1]) == json_object(text + "}") == 0.0


@pytest.mark.parametrize("text", ["", "5", "[]", '"{}"', '{"a": NaN}', "{'a': 1}", '{"a": 1} so', "[" * 100_000])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    assert json_object(text) == 0.0


def test_of_the_keys_that_are_asked_for_their_share_is_paid() -> None:
    assert json_object('{"name": "x", "other": 1}', ["name", "age"]) == 0.5


@given(st.integers(0, 300), st.integers(1, 100))
def test_length_pays_most_at_its_target(words: int, target: int) -> None:
    paid = length("word " * words, target)
    assert 0.0 <= paid <= 1.0 and (paid == 1.0) == (words == target)
    assert words < 2 * target or paid == 0.0


# What hostile responses cannot do ------------------------------------------------------------------------------------

LONG = 200_000
HOSTILE = {
    "digits": "9" * LONG,
    "groups": "1" + ",111" * (LONG // 4) + ",1",
    "fractions": "1/" * (LONG // 2),
    "signs": "-" * LONG + "1",
    "boxes": r"\boxed{" * (LONG // 7),
    "braces": r"\boxed{" + "{" * LONG,
    "closed": r"\boxed{" + "}" * LONG,
    "frac": r"\frac{" + " " * LONG + r"\frac{1" + "1" * LONG,
    "fracs": r"\frac{1}{" * (LONG // 9),
    "text": r"\text{" * (LONG // 6),
    "spaces": "answer" + " " * LONG + "5",
    "answers": "answer is : (((" * (LONG // 15),
    "exponent": "1e" + "9" * LONG,
    "power": r"\boxed{1e99999}",
    "percent": "5 %" * (LONG // 3),
    "points": "." * LONG,
    "tags": "<think>" * (LONG // 7) + "</answer>" * (LONG // 9),
    "json": '{"a":' * (LONG // 5),
    "fence": "`" * LONG,
    "hashes": "#" * LONG,
    "ligatures": "ﷺ" * (LONG // 10),
}
RULES: dict[str, Callable[[str], float]] = {
    "exact": lambda text: exact(text, "5"),
    "math": lambda text: math_answer(text, "5"),
    "math of a text": lambda text: math_answer(text, "(3, 4)"),
    "math in a box": lambda text: math_answer(rf"\boxed{{{text}}}", "5"),
    "choice": lambda text: choice(text, "B"),
    "tags": lambda text: tags(text, ["think", "answer"]),
    "json": json_object,
    "length": lambda text: length(text, 5),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", RULES)
def test_no_text_takes_long(kind: str, name: str) -> None:
    """200,000 characters, which anything quadratic would read for minutes."""
    started = time.process_time()
    assert 0.0 <= RULES[name](HOSTILE[kind]) <= 1.0
    assert time.process_time() - started < 2.0


# By name -------------------------------------------------------------------------------------------------------------


def test_rules_are_reward_functions_by_their_names() -> None:
    assert rule("math")([None] * 3, ["5", "6", "6"], answer=["5", 5, None]) == [1.0, 0.0, None]
    assert rule("exact")([None], ["Yes"], ["yes"]) == [1.0]
    assert rule("choice")([None], ["B"], ["B"]) == [1.0]
    assert rule("tags:think,answer")([None], ["<think></think><answer></answer>"]) == [1.0]
    assert rule("json")([None], ["{}"]) == [1.0] and rule("json:a,b")([None], ['{"a": 1}']) == [0.5]
    assert rule("length:4")([None], ["one two"]) == [0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maths", "there is no rule 'maths'; the nearest one is 'math'"),
        ("math:5", "rule:math:5; expected rule:math alone"),
        ("tags", "expected rule:tags:think,answer"),
        ("tags:a b", "expected rule:tags:think,answer"),
        ("json:a,,b", "expected rule:json:name,age"),
        ("length:0", "expected rule:length:200"),
        ("length:-5", "expected rule:length:200"),
    ],
)
def test_a_rule_that_does_not_exist_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(text)


@pytest.mark.parametrize("answer", [True, "", "  ", [], {}])
def test_an_answer_that_is_none_is_an_error_of_the_data(answer: Any) -> None:
    with pytest.raises(ValueError, match=r"answer: .*; expected text or a number"):
        math_answer("5", answer)
    with pytest.raises(ValueError, match="answer: 'both'; expected a letter"):
        choice("A", "both")
