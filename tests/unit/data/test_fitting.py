"""Rows that are too long: refused by name, cut where it does least harm, or left out; and all of it counted."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data.fitting import Fitting, shortened
from rlhf_fast.data.records import Comparison, Demonstration, PromptRecord, read_comparisons
from rlhf_fast.data.tokenize import tokenize_prompt, tokenize_record
from rlhf_fast.models.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
Message = dict[str, Any]


def fit(limit: int, overlong: Literal["error", "truncate", "drop"] = "truncate", **options: Any) -> Fitting:
    return Fitting(TOKENIZER, limit, overlong, **options)


def said(*texts: str, first: str = "user") -> list[Message]:
    """A conversation in which user and assistant speak in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def count(prompt: Any) -> int:
    return len(tokenize_prompt(TOKENIZER, prompt))


# Prompts -------------------------------------------------------------------------------------------------------------


def test_a_prompt_loses_its_oldest_turns_first_and_never_the_systems() -> None:
    system = [{"role": "system", "content": "be kind"}]
    prompt = [*system, *said("one", "1", "two", "2", "three")]
    whole, less, least = (count([*system, *prompt[i:]]) for i in (1, 3, 5))
    assert shortened(prompt, count, whole - 1) == shortened(prompt, count, less) == [*system, *prompt[3:]]
    assert shortened(prompt, count, less - 1) == shortened(prompt, count, least) == [*system, *prompt[5:]]
    assert shortened(prompt, count, least - 2) == [*system, {"role": "user", "content": "ree"}]
    assert shortened(prompt, count, count([*system, {"role": "user", "content": "e"}]) - 1) is None


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab é\n", min_size=1).filter(str.strip), st.integers(1, 40))
def test_a_text_loses_its_beginning_and_keeps_as_much_as_fits(text: str, room: int) -> None:
    if count(text) <= room:
        return
    found = shortened(text, count, room)
    if found is None:
        assert count(text.rstrip()[-1:]) > room
    else:
        assert isinstance(found, str) and text.rstrip().endswith(found) and count(found) <= room
        longer = len(text.rstrip()[: -len(found)].rstrip()) - 1  # with the next character that is no space
        assert longer < 0 or count(text.rstrip()[longer:]) > room


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_prompts_leave_room_for_a_response(overlong: Any) -> None:
    records = [PromptRecord("short", name="a"), PromptRecord("x" * 50, name="b"), PromptRecord("y" * 4, name="c")]
    fitting = fit(30, overlong)
    kept = fitting.prompts(records, 16)
    assert kept[0] is records[0] and kept[-1] is records[2]
    if overlong == "drop":
        assert len(kept) == 2 and fitting.summary() == {"rows_dropped": 1}
    else:
        assert kept[1].name == "b" and set(str(kept[1].prompt)) == {"x"} and count(kept[1].prompt) == 14
        assert fitting.summary() == {"rows_truncated": 1}
    with pytest.raises(ValueError, match=r"^b: with max_new_tokens = 16 it comes to 68 tokens, more than ppo\.max"):
        fit(30, "error", phase="ppo").prompts(records, 16)


# Demonstrations ------------------------------------------------------------------------------------------------------


def test_a_demonstration_loses_its_tail_and_is_not_taught_to_end_there() -> None:
    row = Demonstration("q", "abcdefgh" * 3)
    (whole,) = tokenize_record(row, TOKENIZER)
    for limit in (8, len(whole) - 1):
        fitting = fit(limit)
        (cut,) = fitting.demonstration(row)
        assert (cut.input_ids, cut.loss_mask) == (whole.input_ids[:limit], whole.loss_mask[:limit])
        assert cut.learned and EOS not in cut.input_ids and fitting.summary() == {"rows_truncated": 1}
    fitting = fit(len(whole))
    assert fitting.demonstration(row) == (whole,) and fitting.summary() == {}


def test_a_long_prompt_gives_way_to_its_answer() -> None:
    (cut,) = fit(20).demonstration(Demonstration("x" * 100, "answer"))
    text = TOKENIZER.decode(cut.input_ids)
    assert text.endswith("answer<eos>") and len(cut) == 20 and cut.learned == 7
    (cut,) = fit(20).demonstration(Demonstration("x" * 100, "y" * 100))
    assert len(cut) == 20 and cut.learned == 10


def test_of_a_long_conversation_the_last_answer_is_kept_where_it_alone_is_learned() -> None:
    row = Demonstration("q", said("one", "more", "two" * 3, first="assistant"))
    (all_turns,), (last,) = fit(16).demonstration(row), fit(16).demonstration(row, turns="last")
    assert "one" in TOKENIZER.decode(all_turns.input_ids)
    assert TOKENIZER.decode(last.input_ids).endswith("twotwotwo<eos>") and len(last) <= 16


def test_what_nothing_is_left_of_is_left_out() -> None:
    system = [{"role": "system", "content": "s" * 40}, {"role": "user", "content": "q"}]
    fitting = fit(20)
    assert fitting.demonstration(Demonstration(system, "a")) == ()
    assert fitting.comparison(Comparison(system, "a", "b")) is None
    assert fitting.prompts([PromptRecord(system)], 1) == []
    assert fitting.summary() == {"rows_dropped": 3}
    with pytest.raises(ValueError, match="sft: no row is left: all 3 have more than 20 tokens; look at the data"):
        fitting.done()


# Comparisons ---------------------------------------------------------------------------------------------------------


def test_both_answers_keep_one_prompt_and_half_of_the_length() -> None:
    fitted = fit(20).comparison(Comparison("x" * 100, "y" * 100, "no"))
    assert fitted is not None
    row, (chosen, rejected) = fitted
    assert chosen.prompt == rejected.prompt == tokenize_prompt(TOKENIZER, row.prompt) and len(chosen.prompt) == 10
    assert len(chosen) == 20 and EOS not in chosen.response and rejected.response[-1] == EOS


def test_answers_that_are_cut_to_the_same_are_left_out() -> None:
    fitting = fit(10)
    assert fitting.comparison(Comparison("q", "y" * 20 + "a", "y" * 20 + "b")) is None
    assert fitting.summary() == {"rows_truncated": 1, "rows_identical": 1}


def test_an_answer_of_several_turns_is_cut_with_what_is_its_own() -> None:
    row = {"chosen": said("q", "one", "more", "two"), "rejected": said("q", "no")}
    (comparison,) = read_comparisons([row])
    whole = fit(100).comparison(comparison)
    cut = fit(len(whole[1][0]) - 2).comparison(comparison)  # type: ignore[index]
    assert whole is not None and cut is not None
    chosen, less = whole[1][0], cut[1][0]
    assert (less.prompt, less.response, less.own) == (chosen.prompt, chosen.response[:-2], chosen.own[:-2])


# What is said --------------------------------------------------------------------------------------------------------


def test_an_error_says_which_setting_takes_the_row() -> None:
    row = Demonstration("question", "answer", "data.jsonl line 7")
    with pytest.raises(ValueError) as caught:
        fit(16, "error").demonstration(row)
    assert str(caught.value) == (
        "data.jsonl line 7: prompt and response have 17 tokens, more than sft.max_length = 16; shorten the text, raise "
        "max_length, or set sft.overlong: truncate, or drop"
    )
    with pytest.raises(ValueError) as caught:
        fit(1024, "error", phase="dpo", context=16).comparison(Comparison("question", "answer", "b", name="row 3"))
    assert str(caught.value) == (
        "row 3: prompt and response have 17 tokens, more than the 16 positions that the model has; shorten the text, "
        "take a model with more, or set dpo.overlong: truncate, or drop"
    )


def test_a_token_without_an_embedding_is_named() -> None:
    fitting = fit(100, vocabulary=97)
    fitting.demonstration(Demonstration("a", "b"))
    for use in (
        lambda: fitting.demonstration(Demonstration("a", "~", "row 1")),
        lambda: fitting.comparison(Comparison("a", "b", "~", name="row 1")),
        lambda: fitting.prompts([PromptRecord("~", name="row 1")], 5),
    ):
        with pytest.raises(ValueError, match=r"^row 1: its token 97 \('~'\) is beyond the model's 97 embeddings"):
            use()


def test_the_log_says_what_became_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    fitting = fit(16)
    fitting.comparison(Comparison("q", "a", "b"))
    fitting.done()
    assert capsys.readouterr().err == ""
    for chosen in ("x" * 50, "b"):
        fitting.comparison(Comparison("q", chosen, "b"))
    fitting.done()
    said = "sft: of 3 rows 1 cut to 16 tokens; 1 left out, as chosen and rejected are the same\n"
    assert capsys.readouterr().err == said
