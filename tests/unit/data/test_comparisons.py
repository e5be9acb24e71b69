"""Comparisons in the forms that people have them in: what is asked, what is answered, and who says what."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.data.batches import Example, pad
from rlhf_fast.data.records import (
    Comparison,
    Demonstration,
    RecordError,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    read_record,
)
from rlhf_fast.data.tokenize import tokenize_comparison, tokenize_prompt
from rlhf_fast.models.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
HH_RLHF = Path(__file__).resolve().parents[4] / "shared" / "data" / "hh-rlhf" / "harmless-base-test.jsonl.gz"
USER = {"role": "user", "content": "question"}
ANSWER, OTHER = ({"role": "assistant", "content": text} for text in ("answer", "other"))
MORE = {"role": "user", "content": "more"}
SYSTEM = {"role": "system", "content": "be kind"}


def read(**row: Any) -> Comparison:
    (comparison,) = read_comparisons([row])
    return comparison


def own_text(example: Example) -> str:
    own = example.own or (True,) * len(example.response)
    return TOKENIZER.decode([token for token, mine in zip(example.response, own, strict=True) if mine])


# A prompt beside whole conversations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["question", " question\n", [USER]])
def test_whole_conversations_that_begin_with_the_prompt_beside_them_are_read_as_one(prompt: Any) -> None:
    """The form of UltraFeedback."""
    found = read(prompt=prompt, chosen=[USER, ANSWER], rejected=[USER, OTHER])
    assert found == Comparison([USER], "answer", "other", name="row 0")
    found = read(prompt=prompt, chosen=[SYSTEM, USER, ANSWER], rejected=[SYSTEM, USER, OTHER])
    assert found.prompt == [SYSTEM, USER]


def test_whole_conversations_that_do_not_begin_with_the_prompt_are_refused() -> None:
    message = "row 0: rejected is a whole conversation, but does not begin with the prompt; leave the prompt out, or"
    with pytest.raises(RecordError, match=message):
        read(prompt="question", chosen=[USER, ANSWER], rejected=[MORE, OTHER])
    with pytest.raises(RecordError, match="row 0: chosen is a whole conversation and the other is not"):
        read(prompt="question", chosen=[USER, ANSWER], rejected="other")


# Several turns -------------------------------------------------------------------------------------------------------

TRANSCRIPT = "\n\nHuman: question\n\nAssistant: answer\n\nHuman: more\n\nAssistant: last"
PARTED = {"chosen": TRANSCRIPT, "rejected": "\n\nHuman: question\n\nAssistant: other"}
LAST = {"role": "assistant", "content": "last"}


@pytest.mark.parametrize(
    "row",
    [
        PARTED,
        {"chosen": [USER, ANSWER, MORE, LAST], "rejected": [USER, OTHER]},
        {"prompt": "question", "chosen": [ANSWER, MORE, LAST], "rejected": OTHER},
    ],
)
def test_of_conversations_that_part_before_their_last_turn_only_the_assistants_words_are_learned(
    row: dict[str, Any],
) -> None:
    (comparison,) = read_comparisons([row])
    assert comparison.messages == ([ANSWER, MORE, LAST], [OTHER])
    assert comparison.chosen == "assistant: answer\n\nuser: more\n\nassistant: last"  # for people
    for scored in (False, True):
        chosen, rejected = tokenize_comparison(comparison, TOKENIZER, scored=scored)
        assert chosen.prompt == rejected.prompt == tokenize_prompt(TOKENIZER, [USER])
        assert (own_text(chosen), own_text(rejected)) == ("answer<eos>last<eos>", "other<eos>")
        behind = tokenize_prompt(TOKENIZER, [USER, ANSWER, MORE])  # exactly what the model is asked with
        assert (chosen.prompt + chosen.response)[: len(behind)] == behind
        batch = pad([rejected, chosen, rejected])
        ends = batch.cu_seqlens.tolist()
        assert TOKENIZER.decode(batch.response_tokens[ends[1] : ends[2]]) == "answer<eos>last<eos>"
        before = batch.input_ids.flatten()[batch.predicted_at]
        for place, token in zip(batch.predicted_at.tolist(), batch.response_tokens.tolist(), strict=True):
            assert batch.input_ids.flatten()[place + 1] == token
        assert len(before) == ends[-1] and batch.input_ids.flatten()[batch.last[1]] == chosen.response[-1]


def test_a_row_of_several_turns_comes_back_from_its_row() -> None:
    (comparison,) = read_comparisons([PARTED])
    again = json.loads(json.dumps(comparison.as_dict()))
    assert read_comparisons([again])[0].messages == comparison.messages


def test_responses_of_several_turns_share_a_row_with_their_prompt() -> None:
    chosen, rejected = tokenize_comparison(read(**PARTED), TOKENIZER)
    together, apart = pad([chosen, rejected], longest_shared=100), pad([chosen, rejected])
    assert together.input_ids.shape[0] == 1
    assert together.response_tokens.equal(apart.response_tokens) and together.cu_seqlens.equal(apart.cu_seqlens)


def test_earlier_turns_that_a_template_renders_otherwise_are_refused_where_they_are_learned(tiny: Any) -> None:
    """A reward model reads the conversation as it stands at its end."""
    _, tokenizer = tiny
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}{{ '' if loop.last or m['role'] == 'user' else '-' }}"
        "{{ m['content'] }}<eos>"
        "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    (comparison,) = read_comparisons([PARTED])
    with pytest.raises(ValueError, match="row 0: an answer of several turns, whose earlier ones the chat template"):
        tokenize_comparison(comparison, tokenizer)
    chosen, _ = tokenize_comparison(comparison, tokenizer, scored=True)
    assert tokenizer.decode(chosen.prompt + chosen.response) == "uquestion<eos>a-answer<eos>umore<eos>alast<eos>"


def test_who_speaks_twice_in_a_transcript_goes_on() -> None:
    found = read(chosen="\n\nHuman: q\n\nAssistant: a\n\nAssistant: b", rejected="\n\nHuman: q\n\nAssistant: c")
    assert (found.chosen, found.rejected, found.messages) == ("a\n\nb", "c", None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PARTED, "chosen": TRANSCRIPT + "\n\nHuman: bye"}, "row 0: chosen ends with the user's turn; expected an"),
        ({**PARTED, "chosen": TRANSCRIPT.replace("more", "")}, "row 0: chosen has an empty turn before its last"),
    ],
)
def test_conversations_in_which_nothing_is_answered_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read_comparisons([row])


@pytest.mark.skipif(not HH_RLHF.exists(), reason="the HH-RLHF sample is not here")
def test_no_comparison_of_hh_rlhf_has_a_users_words_in_an_answer() -> None:
    """Five of its rows part where the assistant speaks twice, which is one turn."""
    found = read_comparisons(HH_RLHF)
    assert len(found) == 2312 and all(comparison.messages is None for comparison in found)
    for comparison in found:
        assert isinstance(comparison.prompt, list)
        roles = [message["role"] for message in comparison.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


# Nulls, and forms of other people's ----------------------------------------------------------------------------------

NULLS = {"completion": None, "messages": None, "prompt": None, "system": None, "chosen": None, "rejected": None}
NULLS |= {"tools": None, "split": None, "margin": None, "confidence": None, "conversations": None, "label": None}


def test_columns_that_are_null_count_as_absent() -> None:
    (prompt,) = read_prompts([{**NULLS, "prompt": "question"}])
    assert prompt.prompt == "question" and prompt.columns["system"] is None
    for row in ({"messages": [USER, ANSWER]}, {"prompt": [USER], "completion": "answer"}):
        assert read_demonstrations([{**NULLS, **row}]) == [Demonstration([USER], "answer", "row 0")]
        assert isinstance(read_record({**NULLS, **row}), Demonstration)
    one = {"prompt": [USER], "chosen": "answer", "rejected": "other"}
    for row in (one, {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}):
        assert read(**{**NULLS, **row}) == Comparison([USER], "answer", "other", name="row 0")
    null = {"role": "system", "content": None}
    assert read_demonstrations([{"messages": [null, USER, ANSWER]}]) == [Demonstration([USER], "answer", "row 0")]


def test_a_system_column_stands_before_the_prompt() -> None:
    (demonstration,) = read_demonstrations([{"system": "be kind", "prompt": "question", "completion": "answer"}])
    assert demonstration.prompt == [SYSTEM, USER]
    assert read(system="be kind", chosen=[USER, ANSWER], rejected=[SYSTEM, USER, OTHER][1:]).prompt == [SYSTEM, USER]
    assert read_prompts([{"system": "be kind", "prompt": [SYSTEM, USER]}])[0].prompt == [SYSTEM, USER]
    with pytest.raises(RecordError, match="row 0: the row has a system column and another system message"):
        read_prompts([{"system": "be rude", "prompt": [SYSTEM, USER]}])


def test_rows_of_sharegpt_are_read() -> None:
    said = [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer"}]
    for key in ("conversations", "messages"):
        assert read_demonstrations([{key: said}]) == [Demonstration([USER], "answer", "row 0")]
    row = {"conversations": said[:1], "chosen": said[1], "rejected": {"from": "gpt", "value": "other"}}
    assert read(**row) == Comparison([USER], "answer", "other", name="row 0")
    assert read(chosen=said, rejected=[said[0], {"from": "gpt", "value": "other"}]).prompt == [USER]
    with pytest.raises(RecordError, match="row 0: a message of messages is from 'bard'; expected one of human, user"):
        read_demonstrations([{"messages": [{"from": "bard", "value": "x"}]}])


@pytest.mark.parametrize(
    ("reader", "row", "messages"),
    [
        (read_demonstrations, {"prompt": "p", "chosen": "c", "rejected": "r"},
         ["'completion' is missing", 'expected {"prompt", "completion"} or', "which `rlhf-fast dpo` and `reward`"]),
        (read_demonstrations, {"prompt": "p"}, ["this is a prompt without an answer, which `rlhf-fast ppo`"]),
        (read_comparisons, {"prompt": "p", "completion": "c"},
         ["'chosen' is missing", 'expected {"prompt", "chosen", "rejected"}', "a demonstration, which `rlhf-fast"]),
        (read_comparisons, {"messages": [USER, ANSWER]}, ["a demonstration, which `rlhf-fast sft` takes"]),
        (read_comparisons, {"prompt": "p"}, ["this is a prompt without an answer"]),
        (read_prompts, {"messages": [USER, ANSWER]}, ["'prompt' is missing", "a demonstration, which `rlhf-fast sft`"]),
        (read_prompts, {"chosen": "c", "rejected": "r"}, ["a comparison, which `rlhf-fast dpo` and `reward` take"]),
        (read_demonstrations, {"text": "t"}, ['a "text" does not say what is asked']),
        (read_demonstrations, {"instruction": "i", "input": "", "output": "o"}, ['rename "instruction"']),
        (read_prompts, {"question": "q", "answer": "a"}, ['rename "question" to "prompt"']),
        (read_demonstrations, {"prompt": "p", "completion": "c", "label": False}, ["label is false, so that the"]),
        (read_demonstrations, {"messages": [{"content": "q"}, ANSWER]},
         ['a message of messages should be {"role": ..., "content": ...} or {"from"', "got {'content': 'q'}"]),
    ],
    ids=lambda value: str(getattr(value, "__name__", value))[:40],
)  # fmt: skip
def test_rows_of_another_kind_are_named_with_the_verb_that_takes_them(
    reader: Any, row: dict[str, Any], messages: list[str]
) -> None:
    with pytest.raises(RecordError) as caught:
        reader([row])
    assert str(caught.value).startswith("row 0: ") and all(message in str(caught.value) for message in messages)
