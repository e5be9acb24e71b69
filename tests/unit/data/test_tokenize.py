"""Text to tokens and back: what is asked, what is learned, the end of a turn, and special tokens that were typed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_fast.data import Tokenized, tokenize_record
from rlhf_fast.data.records import Comparison, RecordError, prompt_text
from rlhf_fast.data.templates import Message, use_template
from rlhf_fast.data.tokenize import decode_response, tokenize_example, tokenize_prompt
from rlhf_fast.models.byte_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, VOCAB_SIZE, byte_tokenizer

PAD, EOS, USER, ASSISTANT = range(4)
TOKENIZER = byte_tokenizer()

texts = st.text(max_size=30)
# Text in which special tokens, whole and cut up, are likely.
hostile = st.lists(texts | st.sampled_from([*SPECIAL_TOKENS, "<", "eos>", "<e<eos>os>", "\ue001", "\ue0011\ue001"]))
hostile = hostile.map("".join)


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def plain(text: str) -> tuple[int, ...]:
    """The ids of a text in which nothing is special, from the vocabulary alone."""
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(ids) == len(text.encode()) and all(SPECIAL_TOKENS.index("<assistant>") < i < VOCAB_SIZE for i in ids)
    return tuple(ids)


def answers_of(conversations: list[Tokenized]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(all that stands before, the answer) of each run of learned tokens."""
    found = []
    for conversation in conversations:
        mask, start = conversation.loss_mask, 0
        for learned, run in itertools.groupby(mask):
            end = start + len(list(run))
            if learned:
                found.append((conversation.input_ids[:start], conversation.input_ids[start:end]))
            start = end
    return found


def learned_text(tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], **options: Any) -> list[str]:
    """The answers that are learned of a record, special tokens spelled out."""
    found = answers_of(tokenize_record(record, tokenizer, **options))
    return [tokenizer.decode(answer, clean_up_tokenization_spaces=False) for _, answer in found]


# Prompts and answers --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(texts)
def test_a_response_ends_with_the_end_token_which_is_not_the_padding(text: str) -> None:
    assert tokenize_example(TOKENIZER, "q", text).response == (*plain(text), EOS)
    assert TOKENIZER.eos_token_id == EOS != TOKENIZER.pad_token_id == PAD


def test_the_template_surrounds_messages_and_opens_the_answer() -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    expected = (USER, *plain("a"), ASSISTANT, *plain("b"), EOS, USER, *plain("c"), ASSISTANT)
    assert tokenize_prompt(TOKENIZER, prompt) == expected


@settings(max_examples=60, deadline=None)
@given(hostile)
def test_text_alone_is_one_user_message(text: str) -> None:
    assert tokenize_prompt(TOKENIZER, text) == tokenize_prompt(TOKENIZER, [{"role": "user", "content": text}])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), hostile), min_size=1, max_size=3))
def test_special_tokens_typed_in_messages_stay_text(turns: list[tuple[str, str]]) -> None:
    prompt: list[Message] = [{"role": role, "content": content} for role, content in [*turns, ("user", "?")]]
    before = [dict(message) for message in prompt]
    expected: list[int] = []
    for role, content in turns:
        expected += [ASSISTANT, *plain(content), EOS] if role == "assistant" else [USER, *plain(content)]
    assert tokenize_prompt(TOKENIZER, prompt) == (*expected, USER, *plain("?"), ASSISTANT)
    assert prompt == before


@settings(max_examples=60, deadline=None)
@given(hostile)
def test_special_tokens_typed_in_responses_stay_text(text: str) -> None:
    example = tokenize_example(TOKENIZER, "q", text)
    assert example.response == (*plain(text), EOS)
    assert decode_response(TOKENIZER, example.response) == text, "and any text comes back from its tokens"


def test_special_tokens_may_be_parsed_where_they_are_typed() -> None:
    assert tokenize_prompt(TOKENIZER, "a<eos>b") == (USER, *plain("a<eos>b"), ASSISTANT)
    parsed = (USER, *plain("a"), EOS, *plain("b"), ASSISTANT)
    assert tokenize_prompt(TOKENIZER, "a<eos>b", parse_special_tokens=True) == parsed
    tokenizer = byte_tokenizer()
    use_template(tokenizer, parse_special_tokens=True)
    assert tokenize_prompt(tokenizer, "a<eos>b") == parsed
    (row,) = tokenize_record({"prompt": "q", "completion": "x<pad>y"}, tokenizer)
    assert row.input_ids[-4:] == (*plain("x"), PAD, *plain("y"), EOS) and row.learned == 4


def test_a_special_token_in_a_role_stays_text() -> None:
    tokenizer = with_template("{% for m in messages %}<user>{{ m.role }}: {{ m.content }}{% endfor %}")
    ids = tokenize_prompt(tokenizer, [{"role": "x<eos>", "content": "a"}])
    assert ids == (USER, *plain("x<eos>: a"))


def test_hostile_text_leaves_the_tokenizer_as_it_was() -> None:
    tokenize_example(TOKENIZER, "<eos>", "<eos>")
    assert TOKENIZER("<eos>", add_special_tokens=False)["input_ids"] == [EOS]


def test_text_comes_back_with_the_spaces_that_it_has() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True  # as many models' files say
    assert decode_response(tokenizer, plain("Yes , it 's so .")) == "Yes , it 's so ."


def test_what_is_too_long_names_its_source_and_what_to_do() -> None:
    assert len(tokenize_example(TOKENIZER, "question", "answer", max_length=17)) == 17
    with pytest.raises(ValueError) as caught:
        tokenize_example(TOKENIZER, "question", "answer", max_length=16, name="data.jsonl line 7")
    assert str(caught.value) == (
        "data.jsonl line 7: prompt and response have 17 tokens, more than max_length = 16; "
        "shorten the text or raise max_length"
    )
    turns: list[Message] = [{"role": role, "content": "x" * 20} for role in ("assistant", "user", "assistant")]
    record = {"prompt": "q", "completion": turns}
    assert len(tokenize_record(record, TOKENIZER, max_length=67)[0]) == 67
    with pytest.raises(ValueError, match=r"have 67 tokens, more than max_length = 66; "):
        tokenize_record(record, TOKENIZER, max_length=66)


# What is learned ------------------------------------------------------------------------------------------------------

TEMPLATES = {
    "stable": CHAT_TEMPLATE,
    "trims": CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim"),
    "trims earlier turns": CHAT_TEMPLATE.replace(
        "{{ message['content'] }}", "{{ message['content'] if loop.last else message['content'] | trim }}"
    ),
    "ends otherwise": CHAT_TEMPLATE.replace("'<eos>'", "'<pad>'"),
    "ends and goes on": CHAT_TEMPLATE.replace("'<eos>'", "'<pad>\n'"),
    "ends twice at last": CHAT_TEMPLATE + "{% if not add_generation_prompt %}{{ '\n<eos>' }}{% endif %}",
    "leaves the end to what follows": CHAT_TEMPLATE.replace("'<eos>'", "''"),
    "leads in": CHAT_TEMPLATE.replace(
        "{{ message['content'] }}", "{{ (': ' if message.role == 'assistant' else '') + message['content'] }}"
    ),
}
ENDS = {"ends otherwise": PAD, "ends and goes on": PAD, "leaves the end to what follows": USER}
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), hostile.filter(str.strip)), max_size=4)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(prompt=hostile.filter(str.strip), first=hostile.filter(str.strip), between=turns, last=hostile.filter(str.strip))
def test_each_answer_is_learned_after_what_the_model_has_before_it_when_it_is_asked(
    template: str, prompt: str, first: str, between: list[tuple[str, str]], last: str
) -> None:
    """Whatever the template does to earlier turns, and nothing else is learned."""
    tokenizer = with_template(TEMPLATES[template])
    rows = [("assistant", first)]
    for role, text in [*between, ("assistant", last)]:  # somebody speaks between two answers
        rows += [("user", "?"), (role, text)] if role == "assistant" else [(role, text)]
    completion: list[Message] = [{"role": role, "content": text} for role, text in rows]
    said: list[Message] = [{"role": "user", "content": prompt}]
    expected = []
    for message in completion:
        if message["role"] == "assistant":
            text = message["content"].strip() if template == "trims" else message["content"]
            answer = (*plain(": " * (template == "leads in") + text), ENDS.get(template, EOS))
            expected.append((tokenize_prompt(tokenizer, said), answer))
        said.append(message)
    record = {"prompt": prompt, "completion": completion}
    encoded = tokenize_record(record, tokenizer)
    assert answers_of(encoded) == expected
    if template in ("stable", "trims", "ends otherwise", "leads in"):
        assert len(encoded) == 1
    assert answers_of(tokenize_record(record, tokenizer, turns="last")) == expected[-1:]


@settings(max_examples=40, deadline=None)
@given(hostile.filter(str.strip), hostile.filter(str.strip), hostile.filter(str.strip))
def test_every_form_of_a_record_has_the_tokens_of_its_parts(prompt: str, response: str, other: str) -> None:
    example = tokenize_example(TOKENIZER, prompt, response)
    asked: list[Message] = [{"role": "user", "content": prompt}]
    said: list[Message] = [{"role": "assistant", "content": response}]
    for record in (
        {"prompt": prompt, "completion": response},
        {"prompt": prompt, "completion": said},
        {"prompt": asked, "completion": response},
        {"messages": asked + said},
    ):
        (found,) = tokenize_record(record, TOKENIZER)
        assert found.input_ids == example.prompt + example.response
        assert found.loss_mask == (False,) * len(example.prompt) + (True,) * len(example.response)
    for pair in ({"prompt": prompt, "chosen": response, "rejected": other}, Comparison(prompt, response, other)):
        chosen, rejected = tokenize_record(pair, TOKENIZER)
        assert answers_of([chosen]) == [(example.prompt, example.response)]
        assert answers_of([rejected]) == [(example.prompt, (*plain(other), EOS))]
    (prompted,) = tokenize_record({"prompt": prompt}, TOKENIZER)
    assert (prompted.input_ids, prompted.learned) == (example.prompt, 0)


def test_a_record_of_no_known_form_names_what_it_has() -> None:
    with pytest.raises(RecordError, match="the record: the row has 'text'; expected messages, a prompt, a prompt with"):
        tokenize_record({"text": "a"}, TOKENIZER)


def test_messages_of_weight_0_are_context() -> None:
    rows = [("user", "a", None), ("assistant", "b", 0), ("user", "c", None), ("assistant", "d", 1)]
    messages = [{"role": role, "content": text, "weight": weight} for role, text, weight in rows]
    whole = (USER, *plain("a"), ASSISTANT, *plain("b"), EOS, USER, *plain("c"), ASSISTANT)
    assert answers_of(tokenize_record({"messages": messages}, TOKENIZER)) == [(whole, (*plain("d"), EOS))]
    with pytest.raises(RecordError, match="every assistant's message has weight 0"):
        tokenize_record({"messages": messages[:2]}, TOKENIZER)
    with pytest.raises(RecordError, match=r"the weight of a message should be 0 or 1, got 0\.5"):
        tokenize_record({"messages": [messages[0], {**messages[1], "weight": 0.5}]}, TOKENIZER)


@pytest.mark.parametrize("template", ["stable", "trims", "ends and goes on", "leads in"])
def test_a_last_message_of_the_assistants_is_gone_on_with(template: str) -> None:
    tokenizer = with_template(TEMPLATES[template])
    prompt = [{"role": "user", "content": "Tell"}, {"role": "assistant", "content": "Once <eos> "}]
    theirs = tokenizer.apply_chat_template(
        [prompt[0], {"role": "assistant", "content": "Once "}], continue_final_message=True, tokenize=False
    )
    lead = ": " * (template == "leads in")
    asked = (USER, *plain("Tell"), ASSISTANT, *plain(lead + "Once <eos> "))
    assert tokenize_prompt(tokenizer, prompt) == asked
    assert theirs.rstrip() == tokenizer.decode(asked).replace("<eos> ", "").rstrip()
    (row,) = tokenize_record({"prompt": prompt, "completion": "upon"}, tokenizer)
    assert answers_of([row]) == [(asked, (*plain("upon"), ENDS.get(template, EOS)))]
    calls = [{"name": "f", "arguments": {}}]
    with pytest.raises(ValueError, match="its last message is an assistant's with tool calls or a thought"):
        tokenize_record({"prompt": [prompt[0], {**prompt[1], "tool_calls": calls}]}, tokenizer)


# Marks ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(hostile.filter(str.strip), hostile.filter(str.strip))
def test_generation_marks_are_obeyed_and_the_end_behind_them_is_learned(first: str, second: str) -> None:
    """What is outside of a mark is not learned; a mark that leaves the end out would teach a model never to stop."""
    inside = "{% generation %}{{ message['content'] }}{% endgeneration %}"
    marked = with_template(CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ 'so: ' }}" + inside, 1))
    assert "generation" in str(marked.chat_template)
    messages = [{"role": role, "content": text} for role, text in zip("ua" * 2, ("q", first, "r", second), strict=True)]
    names = {"u": "user", "a": "assistant"}
    messages = [{**m, "role": names[m["role"]]} for m in messages]
    found = answers_of(tokenize_record({"messages": messages}, marked))
    assert [answer for _, answer in found] == [(*plain(text), EOS) for text in (first, second)]
    assert found[0][0] == (USER, *plain("so: q"), ASSISTANT, *plain("so: "))


def test_a_mark_around_the_end_is_taken_as_it_stands() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}<assistant>{% else %}"
        "{% generation %}{{ m.content }}<eos>\n{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert learned_text(with_template(template), {"prompt": "q", "completion": "a"}) == ["a<eos>\n"]
    with pytest.raises(ValueError, match="the chat template's generation marks hold no token of the answers"):
        other = template.replace("{% generation %}{{ m.content }}<eos>\n", "{{ m.content }}<eos>{% generation %}")
        tokenize_record({"prompt": "q", "completion": "a"}, with_template(other))


# Tokenizers -----------------------------------------------------------------------------------------------------------


def metaspace(prepend: str) -> PreTrainedTokenizerFast:
    """Words behind a mark for their space, as SentencePiece has them: a word alone gets other tokens than within."""
    words = [
        "▁",
        "▁hello",
        "hello",
        "▁world",
        "world",
        "▁a",
        "a",
        "▁question",
        "question",
        "<0x0A>",
        ":",
        "▁:",
        "[",
        "]",
    ]
    vocabulary = [(token, 0.0) for token in ("<unk>", "<s>", "</s>")] + [(word, -1.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("prepend", ["first", "always", "never"])
@pytest.mark.parametrize("lead", ["", " "])
def test_the_text_is_tokenised_whole(prepend: str, lead: str) -> None:
    tokenizer = metaspace(prepend)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}"
        f"{lead}{{{{ m.content }}}}{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}"
    )
    ((asked, answer),) = answers_of(tokenize_record({"prompt": "question", "completion": "hello world"}, tokenizer))
    whole = tokenizer(f"<s>[question]{lead}hello world</s>", add_special_tokens=False)["input_ids"]
    assert (*asked, *answer) == tuple(whole)
    assert tokenizer.convert_ids_to_tokens(answer) == ["▁hello" if lead else "hello", "▁world", "</s>"]


def merging() -> PreTrainedTokenizerFast:
    """Two line ends are one token, as in most vocabularies."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<u>", "<a>", *alphabet, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<eos>", "<u>", "<a>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_an_answer_whose_first_token_would_reach_into_the_prompt_keeps_what_the_model_is_asked() -> None:
    tokenizer = merging()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}<a>\n{% else %}"
        "{{ '\n' }}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    ((asked, answer),) = answers_of(tokenize_record({"prompt": "q", "completion": "x"}, tokenizer))
    assert asked == tokenize_prompt(tokenizer, "q")
    assert tokenizer.convert_ids_to_tokens([*asked[-1:], *answer]) == ["Ċ", "Ċ", "x", "<eos>"]


def test_a_tokenizer_that_adds_an_end_by_itself_ends_no_prompt() -> None:
    tokenizer = with_template(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<user> $A <eos>", special_tokens=[("<user>", USER), ("<eos>", EOS)]
    )
    assert tokenizer("a")["input_ids"] == [USER, *plain("a"), EOS]
    assert tokenize_prompt(tokenizer, "a") == (USER, *plain("a"))
    example = tokenize_example(tokenizer, "a", "b")
    assert (example.prompt, example.response) == ((USER, *plain("a")), (*plain("b"), EOS))


def test_a_normalizer_that_changes_the_text_changes_no_cut() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    ((asked, answer),) = answers_of(tokenize_record({"prompt": "É", "completion": "Ü<eos>Ö"}, tokenizer))
    assert asked == (USER, *plain("e\u0301"), ASSISTANT)
    assert answer == (*plain("u\u0308<eos>o\u0308"), EOS)


# Without a template ---------------------------------------------------------------------------------------------------


def test_without_a_template_one_question_is_text_and_several_roles_are_refused() -> None:
    tokenizer = with_template(None)
    assert tokenize_prompt(tokenizer, "a<eos>") == plain("a<eos>")
    ((asked, answer),) = answers_of(tokenize_record({"prompt": "a", "completion": "b<eos>"}, tokenizer))
    assert (asked, answer) == (plain("a"), (*plain("b<eos>"), EOS))
    prompt = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(ValueError) as caught:
        tokenize_record({"prompt": prompt}, tokenizer)
    assert str(caught.value) == (
        "the record: the tokenizer has no chat template, which messages of the roles system, user need; choose one: "
        "chat_template: chatml, plain, or the file of a Jinja template"
    )


def test_a_prompt_is_shown_to_people_with_its_roles() -> None:
    assert prompt_text("question") == "question"
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "question"}]
    assert prompt_text(messages) == "system: Be kind.\n\nuser: question"
