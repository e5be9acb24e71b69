"""The verb generate: how tokens are chosen, and a chat that remembers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from rlhf_fast import cli, models
from rlhf_fast.cli.chat import Chat, chat
from rlhf_fast.cli.generate import GenerateCommand, choice_of_tokens
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.rollout.sampling import SamplingParams

DEFAULT = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
QWEN = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}


# How tokens are chosen -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "of_model", "is_chat", "expected"),
    [
        ({}, {}, False, {}),
        ({}, {}, True, {"temperature": 0.7, "top_p": 0.9}),
        ({}, QWEN, False, {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}),
        ({}, QWEN, True, {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}),
        ({}, {**QWEN, "do_sample": False}, False, {}),  # its figures say nothing of a model that does not sample
        ({}, {"do_sample": True}, True, {"temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0.0, "top_k": 0}, QWEN, True, {"temperature": 0.0, "top_p": 0.95, "repetition_penalty": 1.05}),
        ({"temperature": 1.0, "top_p": 1.0}, {}, True, {}),  # a setting goes before, even where it is no change
        ({"min_p": 0.1}, {"do_sample": True, "min_p": 0.2}, False, {"min_p": 0.1}),
    ],
)
def test_settings_go_before_the_model_and_the_model_before_defaults(
    given: dict[str, Any], of_model: dict[str, Any], is_chat: bool, expected: dict[str, Any]
) -> None:
    chosen, told = choice_of_tokens(GenerateCommand(**given), GenerationConfig(**of_model), is_chat)
    assert chosen == {**DEFAULT, **expected}
    assert told.startswith(f"Sampling: temperature {chosen['temperature']:g} (")


def test_what_is_told_says_who_chose() -> None:
    command = GenerateCommand(top_p=0.5)
    assert choice_of_tokens(command, GenerationConfig(do_sample=True, temperature=0.6), False)[1] == (
        "Sampling: temperature 0.6 (of the model's generation_config.json), top_p 0.5 (as you set it)"
    )
    assert choice_of_tokens(GenerateCommand(), None, True)[1] == (
        "Sampling: temperature 0.7 (the default of a chat), top_p 0.9 (the default of a chat)"
    )


def test_the_models_own_settings_are_used_and_told(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tiny
    model.generation_config.update(do_sample=True, temperature=0.5, top_k=3)
    models.save(tmp_path / "model", model, tokenizer)
    used: list[SamplingParams] = []
    generate = Generator.generate

    def noting(self: Any, records: Any, params: Any, *args: Any) -> Any:
        used.append(params)
        return generate(self, records, params, *args)

    monkeypatch.setattr(Generator, "generate", noting)
    words = ["generate", "--model", str(tmp_path / "model"), "--prompt", "Hello", "--max_new_tokens", "2"]
    assert cli.main(words) == 0
    assert cli.main([*words, "--temperature", "2"]) == 0
    assert [(params.temperature, params.top_k) for params in used] == [(0.5, 3), (2.0, 3)]
    assert "temperature 0.5 (of the model's generation_config.json), top_k 3 (of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "2"], "--n: a chat has one answer to each line; give --prompt or --prompts for several answers"),
        (["--out", "x"], "--out: a chat has one answer to each line; give --prompt or --prompts for a file of answers"),
    ],
)
def test_what_a_chat_does_not_have_is_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["generate", *words]) == 2
    assert message in capsys.readouterr().err


def test_settings_out_of_range_are_an_error_before_the_model_is_loaded(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert cli.main(["generate", "--model", str(tiny_folder), "--top_p", "2"]) == 1
    assert "top_p: 2.0; expected" in capsys.readouterr().err


def test_a_prompt_beyond_the_models_context_is_named_by_its_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "q"}\n' + json.dumps({"prompt": "x" * 2100}) + "\n")
    assert cli.main(["generate", "--model", str(tiny_folder), "--prompts", str(file)]) == 1
    err = capsys.readouterr().err
    assert f"{file} line 2 has 2102 tokens, which with max_new_tokens = 128 exceeds the model's context of 2048" in err


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (".", "out: . is a folder; expected a file, such as answers.jsonl"),
        ("there.jsonl", "out: there.jsonl is there already; choose another name, or remove it first"),
        ("there.jsonl/x", "out: there.jsonl/x cannot be written, for"),
    ],
)
def test_a_file_that_cannot_be_written_or_would_be_lost_is_refused_first(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str,
    words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    Path("there.jsonl").write_text("mine")
    assert cli.main(["generate", "--model", str(tiny_folder), "--prompt", "q", "--out", out]) == 1
    assert words in capsys.readouterr().err
    assert Path("there.jsonl").read_text() == "mine"


# A chat --------------------------------------------------------------------------------------------------------------


class Fixed:
    """A generator that answers in turn, and keeps what it was asked."""

    class runner:
        class served:
            longest = 10_000

    def __init__(self, tiny: tuple[Any, Any], *answers: str, reason: str = "stop") -> None:
        self.model, self.tokenizer = tiny
        self.answers, self.reason = list(answers), reason
        self.asked: list[str] = []
        self.params: list[SamplingParams] = []

    def stream(self, prompts: Any, params: SamplingParams) -> Any:
        self.asked.append(self.tokenizer.decode(prompts[0]))
        self.params.append(params)
        text = ""
        for word in self.answers.pop(0):
            text += word
            yield type("Piece", (), {"text": text, "finish_reason": ""})
        yield type("Piece", (), {"text": text, "finish_reason": self.reason})


def lines(*typed: str) -> Callable[[], str]:
    rest = iter(typed)

    def read() -> str:
        for line in rest:
            return line
        raise EOFError

    return read


def test_a_chat_remembers_until_another_begins(tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    generator = Fixed(tiny, "one", "two", "three")
    chat(generator, SamplingParams(seed=5), lines("a", "", "b", " /new ", "c", "/quit", "d"))  # type: ignore[arg-type]
    assert generator.asked == [
        "<user>a<assistant>",
        "<user>a<assistant>one<eos><user>b<assistant>",
        "<user>c<assistant>",
    ]
    assert [params.seed for params in generator.params] == [5, 6, 7]
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\nthree\n" and captured.err == "[a new conversation]\n"


def test_commands_are_listed_and_a_path_is_none(tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    generator = Fixed(tiny, "it is")
    chat(generator, SamplingParams(), lines("/help", "/nwe", "/etc/passwd is what?"))  # type: ignore[arg-type]
    err = capsys.readouterr().err
    assert err.count("[/new   begin another") == 2 and "[there is no command /nwe]" in err
    assert generator.asked == ["<user>/etc/passwd is what?<assistant>"]


def test_thoughts_are_shown_and_not_repeated(tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    generator = Fixed(tiny, "<think>hm</think>\nyes", "no")
    chat(generator, SamplingParams(), lines("a", "b"))  # type: ignore[arg-type]
    assert generator.asked[1] == "<user>a<assistant>yes<eos><user>b<assistant>"
    assert "<think>hm</think>" in capsys.readouterr().out


def test_an_answer_that_is_cut_off_is_called_that(tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    generator = Fixed(tiny, "abc", reason="length")
    chat(generator, SamplingParams(max_new_tokens=3), lines("a"))  # type: ignore[arg-type]
    assert "[cut off by --max_new_tokens 3]" in capsys.readouterr().err


def test_ctrl_c_cuts_an_answer_off_and_the_chat_goes_on(
    tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    generator = Fixed(tiny, "ab", "c")
    stream = generator.stream

    def interrupted(prompts: Any, params: Any) -> Any:
        pieces = stream(prompts, params)
        yield next(pieces)
        if len(generator.asked) == 1:
            raise KeyboardInterrupt
        yield from pieces

    generator.stream = interrupted  # type: ignore[method-assign]
    chat(generator, SamplingParams(), lines("x", "y"))  # type: ignore[arg-type]
    assert generator.asked[1] == "<user>x<assistant>a<eos><user>y<assistant>"
    assert capsys.readouterr().out == "a\nc\n"


def test_a_conversation_beyond_the_models_context_is_named_and_the_chat_goes_on(
    tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    generator = Fixed(tiny, "one", "two", "three")
    talk = Chat(generator, SamplingParams(max_new_tokens=20))  # type: ignore[arg-type]
    talk.context = 16
    talk.answer("a" * 20)
    assert "[the conversation has 22 tokens, and the model takes 16 with the answer; a shorter line is" in (
        capsys.readouterr().err
    )
    talk.answer("abc")  # 5 tokens: 11 are left
    talk.answer("def")
    assert [params.max_new_tokens for params in generator.params] == [11, 2]
    talk.answer("ghi")
    assert "tokens, and the model takes 16 with the answer; /new begins another]" in capsys.readouterr().err
    talk.obey("/new")
    talk.answer("jkl")
    assert generator.asked[-1] == "<user>jkl<assistant>"


def test_a_line_that_the_template_refuses_is_said_and_forgotten(
    tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny[1].chat_template = "{{ raise_exception('no more than one message') if messages | length > 1 }}" + (
        "{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    generator = Fixed(tiny, "one")
    chat(generator, SamplingParams(), lines("a", "b"))  # type: ignore[arg-type]
    err = capsys.readouterr().err
    assert "no more than one message" in err and "/new begins another" in err


def test_without_a_template_each_line_is_a_text_of_its_own(tiny: tuple[Any, Any]) -> None:
    tiny[1].chat_template = None
    generator = Fixed(tiny, "one", "two")
    chat(generator, SamplingParams(), lines("a", "b"))  # type: ignore[arg-type]
    assert generator.asked == ["a", "b"]


def test_a_chat_from_a_pipe_is_a_chat(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nAnd you?\n/new\nHello\n"))
    assert cli.main(["generate", "--model", str(tiny_folder), "--max_new_tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") >= 3 and "\x1b" not in captured.out
    assert "Sampling: temperature 0.7 (the default of a chat)" in captured.err
