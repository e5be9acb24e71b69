"""Chat templates of other people's models: what is learned of an answer is what they render, through its end."""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_fast.data import tokenize_record
from rlhf_fast.data.records import read_comparisons
from rlhf_fast.data.templates import use_template
from rlhf_fast.data.tokenize import tokenize_example, tokenize_prompt
from rlhf_fast.models.byte_tokenizer import byte_tokenizer
from tests.unit.data.test_tokenize import answers_of, learned_text

# TRL's package carries the templates of many models, as they are shipped and with generation marks of its own.
_TRL = importlib.util.find_spec("trl")
TEMPLATES = {
    file.stem: file.read_text(encoding="utf-8")
    for file in (Path(str(_TRL.origin)).parent / "chat_templates").glob("*.jinja")
} if _TRL else {}  # fmt: skip
MARKED = re.compile(r"\{%-?\s*generation")
ENDS = {  # how each ends a turn, by the beginning of its name, the longest that fits
    "cohere": "<|END_OF_TURN_TOKEN|>", "deepseek": "<｜end▁of▁sentence｜>", "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>", "gemma4": "<turn|>", "glm4moe": "<|user|>", "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>", "lfm2": "<|im_end|>", "llama3": "<|eot_id|>", "llava_next": "</s>",
    "muse": "<|eot|>", "nemotron": "<|im_end|>", "phi3": "<|end|>", "qwen": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}  # fmt: skip
EOS = {  # the end token of the tokenizer, where it is another one
    "gemma": "<eos>", "gemma4": "<eos>", "diffusion_gemma": "<eos>", "glm4moe": "<|endoftext|>",
    "phi3": "<|endoftext|>",
}  # fmt: skip
OPENED = {  # a generation prompt whose end the answer does not repeat: what is learned after it
    "deepseek": "\n</think>\n\nAnswer one.<｜end▁of▁sentence｜>", "nemotron": "</think>Answer one.<|im_end|>",
}  # fmt: skip
_SPECIAL = re.compile(
    r"<\|?\w*turn\|?>|<\|tool_\w+>|<tool_\w+\|>|<\|[\w ]+\|>|<｜[^｜]+｜>|<[a-z]+_of_[a-z]+>|\[gMASK\]|<sop>"
)
Q, A = {"role": "user", "content": "Question one?"}, {"role": "assistant", "content": "Answer one."}
R, B = {"role": "user", "content": "Question two?"}, {"role": "assistant", "content": "Answer two."}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of now.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}},
        },
    }
]
CALLED = [Q, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "sunny"}, B]

pytestmark = pytest.mark.skipif(not TEMPLATES, reason="TRL's templates are not installed")


def of(name: str, table: dict[str, str], default: str = "") -> str:
    return table.get(max((key for key in table if name.startswith(key)), key=len, default=""), default)


def tokenizer_for(name: str, template: str = "") -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens that the template writes."""
    template = template or TEMPLATES[name]
    eos = of(name, EOS) or of(name, ENDS, "<|eos|>")
    special = list(dict.fromkeys(["<|bos|>", "<|pad|>", eos, of(name, ENDS, eos), *_SPECIAL.findall(template)]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", pad_token="<|pad|>", eos_token=eos
    )
    tokenizer.chat_template = template
    return tokenizer


def rendered(tokenizer: PreTrainedTokenizerFast, messages: list[Any], ask: bool, **kwargs: Any) -> str:
    """As transformers renders it."""
    for form in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        said = [{**m, "content": form(m["content"])} if m.get("content") else m for m in messages]
        try:
            text = str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=ask, **kwargs))
        except Exception:  # of a template that wants the other form
            continue
        if messages[0]["content"] in text:
            return text
    raise AssertionError("not rendered")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_an_answer_is_learned_as_the_template_renders_it_through_the_end_of_its_turn(name: str) -> None:
    tokenizer = tokenizer_for(name)
    asked, whole = rendered(tokenizer, [Q], True), rendered(tokenizer, [Q, A], False)
    ((before, answer),) = answers_of(tokenize_record({"messages": [Q, A]}, tokenizer))
    text, end = tokenizer.decode(answer), of(name, ENDS)
    if opened := of(name, OPENED):
        assert not whole.startswith(asked) and text == opened
    elif MARKED.search(TEMPLATES[name]):
        assert end in text and (*before, *answer) == ids_of(tokenizer, whole)[: len(before + answer)]
    else:
        following = whole if end in whole[len(asked) :] else rendered(tokenizer, [Q, A, R], False)
        assert text == following[len(asked) : following.index(end, len(asked)) + len(end)]
    if opened or not MARKED.search(TEMPLATES[name]):
        assert before == ids_of(tokenizer, asked) == tokenize_prompt(tokenizer, [Q])
        assert text.endswith(end)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_marks_of_the_template_are_what_is_learned(name: str) -> None:
    """Of a conversation that the template renders in one piece; as transformers reads the marks."""
    tokenizer = tokenizer_for(name)
    if of(name, OPENED) or not MARKED.search(TEMPLATES[name]):
        pytest.skip("no marks, or an answer that the model is asked for in another context")
    found = tokenize_record({"messages": [Q, A, R, B]}, tokenizer)
    messages = [Q, A, R, B] if len(found) == 1 else [Q, A]
    said = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    for conversation in (messages, said):
        try:
            theirs = tokenizer.apply_chat_template(
                conversation, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
            )
        except Exception:  # it wants the other form
            continue
        if sum(theirs["assistant_masks"]) > 10:
            break
    size = len(found[0])
    assert found[0].input_ids == tuple(theirs["input_ids"][:size])
    mask = [bool(x) for x in theirs["assistant_masks"]]
    assert list(found[0].loss_mask) == mask[:size] and not any(mask[size:])


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_each_turn_is_learned_in_the_context_that_the_model_is_asked_in(name: str) -> None:
    tokenizer = tokenizer_for(name)
    found = answers_of(tokenize_record({"messages": [Q, A, R, B]}, tokenizer))
    assert len(found) == 2
    for (before, answer), said, text in zip(found, ([Q], [Q, A, R]), ("Answer one.", "Answer two."), strict=True):
        assert text in tokenizer.decode(answer)
        asked = rendered(tokenizer, said, True)
        if of(name, OPENED) or not MARKED.search(TEMPLATES[name]):
            assert before == ids_of(tokenizer, asked)
        else:  # what is marked may begin within the generation prompt
            assert asked.startswith(tokenizer.decode(before))


THINKS = {  # of those that render a thought of the last turn: what is learned
    "qwen3": "<think>\nHm, so.\n</think>\n\nAnswer one.<|im_end|>",
    "qwen3_6": "Hm, so.\n</think>\n\nAnswer one.<|im_end|>",
    "qwen3_8": "Hm, so.\n</think>\n\nAnswer one.<|im_end|>",
    "qwen3_5_think": "Hm, so.\n</think>\n\nAnswer one.<|im_end|>",
    "deepseek_r1_distill": "Hm, so.\n</think>\n\nAnswer one.<｜end▁of▁sentence｜>",
    "deepseekv3": "Hm, so.\n</think>\n\nAnswer one.<｜end▁of▁sentence｜>",
    "glm4moe": "\n<think>Hm, so.</think>\nAnswer one.<|user|>",
    "gptoss": "<|channel|>analysis<|message|>Hm, so.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Answer one.<|return|>",
    "nemotron_3_nano": "Hm, so.\n</think>\nAnswer one.<|im_end|>",
    "nemotron_3_ultra": "Hm, so.</think>Answer one.<|im_end|>",
    "muse_glimmer": " to=self<|message|>Hm, so.<|eom|><|start|>assistant to=user<|message|>Answer one.<|eot|>",
    "gemma4_v5": "<|channel>thought\nHm, so.\n<channel|>Answer one.<turn|>",
}  # fmt: skip
TAGS = (
    "qwen3",
    "qwen3_6",
    "qwen3_8",
    "qwen3_5_think",
    "deepseek_r1_distill",
    "deepseekv3",
    "glm4moe",
    "nemotron_3_nano",
)


@pytest.mark.parametrize("name", THINKS)
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_is_learned_before_its_answer(name: str, key: str) -> None:
    row = {"messages": [Q, {**A, key: "Hm, so."}]}
    assert learned_text(tokenizer_for(name), row) == [THINKS[name]]


@pytest.mark.parametrize("name", TAGS)
def test_a_thought_within_the_content_is_learned_as_well(name: str) -> None:
    tokenizer = tokenizer_for(name)
    (text,) = learned_text(tokenizer, {"messages": [Q, {**A, "content": "<think>\nHm, so.\n</think>\n\nAnswer one."}]})
    assert "".join(text.split()) == "".join(THINKS[name].split())
    assert text.count("</think>") == 1


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "gemma", "phi3", "gemma4"])
def test_a_thought_that_the_template_would_drop_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match="the record: the chat template does not render reasoning_content, which would"
    ):
        tokenize_record({"messages": [Q, {**A, "reasoning_content": "Hm, so."}]}, tokenizer_for(name))


def test_a_thought_where_the_generation_prompt_leaves_no_place_is_refused_with_what_to_set() -> None:
    tokenizer, row = tokenizer_for("qwen3_5_nothink"), {"messages": [Q, {**A, "reasoning_content": "Hm, so."}]}
    with pytest.raises(
        ValueError, match=r"message 1 has a thought, for which the generation prompt leaves no place, as"
    ):
        tokenize_record(row, tokenizer)
    assert learned_text(tokenizer, row, template_kwargs={"enable_thinking": True}) == [THINKS["qwen3_5_think"]]


def test_whatever_a_model_wrote_can_be_read() -> None:
    for name in (name for name in TEMPLATES if not name.endswith("_training")):
        tokenizer = tokenizer_for(name)
        for text in ("", "a</think>b</think>c", "<think>", "</s><|im_end|>"):
            example = tokenize_example(tokenizer, [Q], text, strict=False)
            asked = tokenize_prompt(tokenizer, [Q])
            assert example.prompt == asked
            assert "".join(text.split()) in "".join(tokenizer.decode(asked + example.response).split())


# Tools ----------------------------------------------------------------------------------------------------------------

CALLS = {  # what is learned of a turn that calls a tool
    "qwen2_5": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
    "glm4moe": "\n<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
    "</tool_call><|observation|>",
    "gptoss": ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
    "lfm2_v2": "<|tool_call_start|>[get_weather(city='Paris')]<|tool_call_end|><|im_end|>",
    "llama3_1": '{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>',
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|><|tool_response>',
    "qwen3_6": "\n</think>\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
    "</tool_call><|im_end|>",
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("arguments", ["object", "text"])
@pytest.mark.parametrize("envelope", [True, False])
def test_calls_of_tools_are_learned_and_their_results_are_context(name: str, arguments: str, envelope: bool) -> None:
    function = {"name": "get_weather", "arguments": {"city": "Paris"} if arguments == "object" else '{"city": "Paris"}'}
    call = {"type": "function", "id": "c1", "function": function} if envelope else function
    messages = [Q, {**CALLED[1], "tool_calls": [call]}, {**CALLED[2], "name": "get_weather", "tool_call_id": "c1"}, B]
    for tools in (TOOLS, json.dumps(TOOLS)):
        tokenizer = tokenizer_for(name)
        called, answered = answers_of(tokenize_record({"messages": messages, "tools": tools}, tokenizer))
        assert tokenizer.decode(called[1]) == CALLS[name]
        assert "Answer two." in tokenizer.decode(answered[1])
        assert "sunny" in tokenizer.decode(answered[0]) and "The weather of now." in tokenizer.decode(called[0])


def test_calls_in_the_form_that_a_template_of_texts_takes() -> None:
    """DeepSeek's puts the arguments behind each other as they are, and takes null for an answer without words."""
    for name in ("deepseekv3", "deepseek_r1_distill"):
        (text, _) = learned_text(tokenizer_for(name), {"messages": CALLED})
        assert 'get_weather\n```json\n{"city": "Paris"}\n```' in text and text.startswith("\n</think>\n\n")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("qwen2_5", {"messages": [{"role": "critic", "content": "Bad."}, Q, A]}, r"message 0, of role 'critic'"),
        (
            "gemma",
            {"messages": [{"role": "system", "content": "Be."}, Q, A]},
            "the chat template refuses the messages: Sy",
        ),
        ("deepseekv3", {"messages": [Q, A], "tools": TOOLS}, "the chat template does not render tools"),
        ("lfm2", {"messages": CALLED}, "does not render the call of 'get_weather'"),
        ("phi3", {"messages": CALLED}, "does not render the call of 'get_weather'"),
    ],
)
def test_what_a_template_does_not_render_is_refused_by_name(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^the record: .*{message}"):
        tokenize_record(row, tokenizer_for(name))


def test_a_short_text_that_is_not_rendered_is_not_taken_for_one_that_stands_elsewhere() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}<user>{{ m.content }}{% endfor %}<assistant>"
    )
    with pytest.raises(ValueError, match="the chat template does not render message 0, of role 'system'"):
        tokenize_record({"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}]}, tokenizer)


def test_special_tokens_that_are_typed_stay_text_and_nothing_is_put_before_what_surrounds_them() -> None:
    """Of a tokenizer that puts a space before a text, behind which these would stand."""
    letters = ["▁", *(chr(i) for i in range(33, 127)), "\n"]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "<eos>", *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "<eos>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<eos>", pad_token="<s>")
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    row = {"messages": [Q, {"role": "assistant", "content": "no <eos> here"}]}
    (found,) = tokenize_record(row, tokenizer)
    learned = [token for token, mine in zip(found.input_ids, found.loss_mask, strict=True) if mine]
    assert learned.count(1) == 1 and learned[-1] == 1  # the end alone is one
    assert "".join(tokenizer.convert_ids_to_tokens(learned)).replace("▁", " ") == "no <eos> here<eos>"


# Settings -------------------------------------------------------------------------------------------------------------


def test_a_template_may_change_what_is_asked_where_roles_must_take_turns() -> None:
    """Then it is seen by whether the text follows that of the message, in a conversation that stays one."""
    turns = (
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    )
    said = "<{{ m.role }}>{{ m.content | replace('one', '1') if m.role == 'user' else m.content }}<eos>"
    tokenizer = byte_tokenizer()
    use_template(tokenizer, None)
    tokenizer.chat_template = (
        "{% for m in messages %}"
        + turns
        + said
        + "{% endfor %}"
        + ("{% if add_generation_prompt %}<assistant>{% endif %}")
    )
    row = {"messages": [Q, A, R, B]}
    assert learned_text(tokenizer, row) == ["Answer one.<eos>", "Answer two.<eos>"]
    (asked,) = [tokenizer.decode(one.input_ids) for one in tokenize_record(row, tokenizer)]
    assert asked.startswith("<user>Question 1?<eos>")


def test_settings_of_a_template_reach_it_and_are_saved_with_the_tokenizer(tmp_path: Path) -> None:
    row = {"messages": [Q, A]}
    tokenizer = tokenizer_for("qwen3")
    thinking = learned_text(tokenizer, row)
    assert learned_text(tokenizer, row, template_kwargs={"enable_thinking": False}) == ["Answer one.<|im_end|>"]
    assert learned_text(tokenizer, {**row, "chat_template_kwargs": {"enable_thinking": False}}) == [
        "Answer one.<|im_end|>"
    ]
    assert learned_text(tokenizer, row) == thinking == ["<think>\n\n</think>\n\nAnswer one.<|im_end|>"]
    use_template(tokenizer, kwargs={"enable_thinking": False}, date=datetime.date(2026, 1, 2))
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert learned_text(loaded, row) == ["Answer one.<|im_end|>"]
        assert learned_text(loaded, row, template_kwargs={"enable_thinking": True}) == thinking
    assert "2026" not in (tmp_path / "tokenizer_config.json").read_text(), "the date belongs to a run"


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_settings_that_the_conversation_itself_gives_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"template_kwargs: '{name}' is given by the conversation itself"):
        tokenize_record({"prompt": "q"}, tokenizer_for("qwen3"), template_kwargs={name: []})


@pytest.mark.parametrize("name", ["gptoss", "llama3_2"])
def test_a_template_that_reads_the_date_is_told_that_of_the_run(name: str) -> None:
    tokenizer = tokenizer_for(name)
    form = "%Y-%m-%d" if name == "gptoss" else "%d %b %Y"
    today, day = datetime.date.today(), datetime.date(2001, 2, 3)
    assert today.strftime(form) in tokenizer.decode(tokenize_prompt(tokenizer, [Q]))
    theirs = rendered(tokenizer, [Q], True)
    use_template(tokenizer, date=day)
    told = tokenizer.decode(tokenize_prompt(tokenizer, [Q]))
    assert told == theirs.replace(today.strftime(form), day.strftime(form))
    tokenizer.chat_template = "{{ strftime_now(form) }}" + str(tokenizer.chat_template)
    with pytest.raises(ValueError, match="chat_template: it reads the date in a format that is not written out"):
        tokenize_prompt(tokenizer, [Q])


def test_a_base_model_is_given_a_template(tmp_path: Path) -> None:
    said = [{"role": "system", "content": "Be."}, Q, A, R, B]
    plain = byte_tokenizer()
    use_template(plain, "plain")
    assert learned_text(plain, {"messages": said}) == [" Answer one.<eos>", " Answer two.<eos>"]
    asked = "System: Be.\n\nUser: Question one?\n\nAssistant:"
    assert plain.decode(tokenize_prompt(plain, said[:2])).removeprefix("<s>") == asked
    with pytest.raises(ValueError, match=r"chat_template: chatml needs the token <\|im_start\|>, which this tokenizer"):
        use_template(byte_tokenizer(), "chatml")
    chatml = tokenizer_for("qwen2_5")
    chatml.chat_template = None
    use_template(chatml, "chatml")
    assert learned_text(chatml, {"messages": said}) == ["Answer one.<|im_end|>", "Answer two.<|im_end|>"]
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}")
    mine = byte_tokenizer()
    use_template(mine, str(file))
    assert learned_text(mine, {"messages": said}) == ["assistant=Answer one.;<eos>", "assistant=Answer two.;<eos>"]
    with pytest.raises(
        ValueError, match=r"chat_template: 'none\.jinja' is neither chatml nor plain nor a file that can be"
    ):
        use_template(byte_tokenizer(), "none.jinja")


def test_content_may_be_a_list_of_texts_and_nothing_else() -> None:
    tokenizer = tokenizer_for("qwen2_5")
    parts = [{"type": "text", "text": "Question "}, {"type": "text", "text": "one?"}]
    whole = tokenize_record({"messages": [Q, A]}, tokenizer)
    assert tokenize_record({"messages": [{**Q, "content": parts}, A]}, tokenizer) == whole
    with pytest.raises(
        ValueError, match="the content of a message of messages has a part of type 'image'; only text can"
    ):
        tokenize_record({"messages": [{**Q, "content": [{"type": "image", "image": "a.png"}]}, A]}, tokenizer)
    with pytest.raises(ValueError, match="the content of a message of prompt should be text, got NoneType"):
        tokenize_record({"prompt": [{"role": "user", "content": None}]}, tokenizer)


def test_compared_answers_may_call_tools_and_think() -> None:
    """And a row of them is the same when it is written and read again."""
    calls, thinks = {**CALLED[1], "role": "assistant"}, {**A, "reasoning_content": "Hm, so."}
    row = {"prompt": [Q], "chosen": [calls], "rejected": [thinks], "tools": TOOLS}
    (comparison,) = read_comparisons([row])
    assert (comparison.chosen, comparison.rejected) == ('get_weather({"city": "Paris"})', "(Hm, so.)\nAnswer one.")
    tokenizer = tokenizer_for("qwen3")
    for pair in (row, comparison, read_comparisons([json.loads(json.dumps(comparison.as_dict()))])[0]):
        chosen, rejected = answers_of(tokenize_record(pair, tokenizer))
        assert tokenizer.decode(chosen[1]) == "<think>\n\n</think>\n\n" + CALLS["qwen2_5"]
        assert tokenizer.decode(rejected[1]) == THINKS["qwen3"]
    plain = answers_of(tokenize_record({"prompt": [Q], "chosen": [A], "rejected": "no"}, tokenizer))
    assert [tokenizer.decode(answer).split("</think>\n\n")[1] for _, answer in plain] == [
        "Answer one.<|im_end|>", "no<|im_end|>",
    ]  # fmt: skip
    (whole,) = read_comparisons([{"chosen": [Q, calls], "rejected": [Q, thinks], "tools": TOOLS}])
    assert whole == comparison
