"""Text to tokens and back: templates, the end token, and special tokens that somebody typed."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rlhf_fast.data.chat import (
    Message,
    decode_response,
    encode,
    encode_conversation,
    encode_prompt,
    encode_response,
    prompt_text,
)
from rlhf_fast.data.conversations import Conversation
from rlhf_fast.models.byte_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, VOCAB_SIZE, byte_tokenizer

PAD, EOS, USER, ASSISTANT = range(4)
TOKENIZER = byte_tokenizer()

texts = st.text(max_size=30)
# Text in which special tokens, whole and cut up, are likely.
hostile = st.lists(texts | st.sampled_from([*SPECIAL_TOKENS, "<", "eos>", "<e<eos>os>", "\ue000", "\ue0001\ue000"]))
hostile = hostile.map("".join)


def without_template() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def plain(text: str) -> tuple[int, ...]:
    """The ids of a text in which nothing is special, from the vocabulary alone."""
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(ids) == len(text.encode()) and all(SPECIAL_TOKENS.index("<assistant>") < i < VOCAB_SIZE for i in ids)
    return tuple(ids)


@settings(max_examples=60, deadline=None)
@given(texts)
def test_a_response_ends_with_the_end_token_which_is_not_the_padding(text: str) -> None:
    ids = encode_response(TOKENIZER, text)
    assert ids == (*plain(text), EOS)
    assert TOKENIZER.eos_token_id == EOS != TOKENIZER.pad_token_id == PAD


def test_the_template_surrounds_messages_and_opens_the_answer() -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    expected = (USER, *plain("a"), ASSISTANT, *plain("b"), EOS, USER, *plain("c"), ASSISTANT)
    assert encode_prompt(TOKENIZER, prompt) == expected


@settings(max_examples=60, deadline=None)
@given(hostile)
def test_text_alone_is_one_user_message(text: str) -> None:
    assert encode_prompt(TOKENIZER, text) == encode_prompt(TOKENIZER, [{"role": "user", "content": text}])


def test_without_a_template_messages_are_joined_by_blank_lines() -> None:
    prompt = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert encode_prompt(without_template(), prompt) == plain("a\n\nb")
    assert encode_prompt(without_template(), "a") == plain("a")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), hostile), min_size=1, max_size=3))
def test_special_tokens_typed_in_messages_stay_text(turns: list[tuple[str, str]]) -> None:
    prompt: list[Message] = [{"role": role, "content": content} for role, content in turns]
    before = [dict(message) for message in prompt]
    expected: list[int] = []
    for role, content in turns:
        expected += [ASSISTANT, *plain(content), EOS] if role == "assistant" else [USER, *plain(content)]
    assert encode_prompt(TOKENIZER, prompt) == (*expected, ASSISTANT)
    assert encode_prompt(without_template(), prompt) == plain("\n\n".join(content for _, content in turns))
    assert prompt == before


@settings(max_examples=60, deadline=None)
@given(hostile)
def test_special_tokens_typed_in_responses_stay_text(text: str) -> None:
    assert encode_response(TOKENIZER, text) == (*plain(text), EOS)


def test_a_special_token_in_a_role_stays_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m.role }}: {{ m.content }}{% endfor %}"
    ids = encode_prompt(tokenizer, [{"role": "x<eos>", "content": "a"}])
    assert ids == (USER, *plain("x<eos>: a"))


def test_encoding_hostile_text_leaves_the_tokenizer_as_it_was() -> None:
    encode_prompt(TOKENIZER, "<eos>")
    encode_response(TOKENIZER, "<eos>")
    assert TOKENIZER("<eos>", add_special_tokens=False)["input_ids"] == [EOS]


@settings(max_examples=60, deadline=None)
@given(hostile)
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    assert decode_response(TOKENIZER, encode_response(TOKENIZER, text)) == text


@settings(max_examples=60, deadline=None)
@given(texts, texts)
def test_an_example_holds_prompt_and_response_up_to_its_longest(prompt: str, response: str) -> None:
    length = len(encode_prompt(TOKENIZER, prompt)) + len(encode_response(TOKENIZER, response))
    example = encode(TOKENIZER, prompt, response, length, "here")
    assert (example.prompt, example.response) == (
        encode_prompt(TOKENIZER, prompt),
        encode_response(TOKENIZER, response),
    )
    assert len(example) == length
    with pytest.raises(ValueError, match=f"^here: prompt and response have {length} tokens"):
        encode(TOKENIZER, prompt, response, length - 1, "here")


def test_an_example_that_is_too_long_names_its_source_and_what_to_do() -> None:
    with pytest.raises(ValueError) as caught:
        encode(TOKENIZER, "question", "answer", 10, "data.jsonl line 7")
    assert str(caught.value) == (
        "data.jsonl line 7: prompt and response have 17 tokens, more than max_length = 10; "
        "shorten the text or raise max_length"
    )


def answers_of(conversations: tuple[Conversation, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(all that stands before, the answer) of each run of learned tokens."""
    found = []
    for conversation in conversations:
        mask, start = conversation.loss_mask, 0
        for learned, run in itertools.groupby(mask):
            end = start + len(list(run))
            if learned:
                found.append((conversation.ids[:start], conversation.ids[start:end]))
            start = end
    return found


TEMPLATES = {
    "stable": CHAT_TEMPLATE,
    "trims": CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim"),
    "forgets": CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] if loop.last else '...' }}"),
    "ends otherwise": CHAT_TEMPLATE.replace("'<eos>'", "'<pad>'"),
    "none": None,
}
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), hostile.filter(str.strip)), max_size=5)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(prompt=hostile.filter(str.strip), first=hostile, between=turns, last=hostile)
def test_each_answer_is_learned_after_what_the_model_has_before_it_when_it_is_asked(
    template: str, prompt: str, first: str, between: list[tuple[str, str]], last: str
) -> None:
    """Whatever the template does to earlier turns, and nothing else is learned."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    completion: list[Message] = [
        {"role": role, "content": text} for role, text in [("assistant", first), *between, ("assistant", last)]
    ]
    said, expected = [{"role": "user", "content": prompt}], []
    for message in completion:
        if message["role"] == "assistant":
            expected.append((encode_prompt(tokenizer, said), encode_response(tokenizer, message["content"])))
        said.append(message)
    encoded = encode_conversation(tokenizer, prompt, completion, 1 << 20, "")
    assert answers_of(encoded) == expected
    if template == "stable":
        assert len(encoded) == 1
    only = encode_conversation(tokenizer, prompt, completion, 1 << 20, "", turns="last")
    assert answers_of(only) == expected[-1:]


@settings(max_examples=40, deadline=None)
@given(hostile.filter(str.strip), hostile)
def test_one_answer_alone_is_the_example_of_its_prompt_and_response(prompt: str, response: str) -> None:
    example = encode(TOKENIZER, prompt, response, 1 << 20, "")
    for completion in (response, [{"role": "assistant", "content": response}]):
        (conversation,) = encode_conversation(TOKENIZER, prompt, completion, 1 << 20, "")
        assert conversation.ids == example.prompt + example.response
        assert conversation.loss_mask == (False,) * len(example.prompt) + (True,) * len(example.response)


def test_a_conversation_that_is_too_long_names_its_source() -> None:
    turns: list[Message] = [{"role": role, "content": "x" * 20} for role in ("assistant", "user", "assistant")]
    assert len(encode_conversation(TOKENIZER, "q", turns, 67, "row 3")[0]) == 67
    with pytest.raises(ValueError, match=r"^row 3: prompt and response have 67 tokens, more than max_length = 66; "):
        encode_conversation(TOKENIZER, "q", turns, 66, "row 3")


def test_a_prompt_is_shown_to_people_with_its_roles() -> None:
    assert prompt_text("question") == "question"
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "question"}]
    assert prompt_text(messages) == "system: Be kind.\n\nuser: question"
