"""The verb generate: answers to the prompts of a file, to one prompt, or a chat with what is typed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.cli import inputs
from rlhf_fast.config.settings import ConfigError

if TYPE_CHECKING:
    from rlhf_fast.rollout.sampling import SamplingParams

# How tokens are chosen where neither a setting nor the model's generation_config.json says it. A file's answers are
# samples of the model as it is; a chat is read, and leaves out what is unlikely.
FOR_PROMPTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
FOR_CHAT = {**FOR_PROMPTS, "temperature": 0.7, "top_p": 0.9}


@dataclass(frozen=True)
class GenerateCommand:
    """Sample answers to the prompts of a file, to one prompt, or chat in the terminal.

    With neither --prompts nor --prompt it is a chat, which remembers what was said; /new begins another one, and /help
    lists what else there is. How tokens are chosen is, by default, what the model's generation_config.json says, if it
    samples at all; else a temperature of 1.0 for prompts, the model's own probabilities, and in a chat 0.7 with top_p
    0.9. A line on stderr says what it is.
    """

    prompts: str = ""  # {"prompt"} a line
    prompt: str = ""  # one prompt, in place of a file; with neither it is a chat
    out: str = ""  # JSON Lines; empty: standard output
    model: str = "smollm2-135m"  # folder, run, hub name or smollm2-135m
    n: int = 1  # answers to each prompt
    temperature: float | None = None  # 0.0 takes the likeliest token; none: the model's, else 1.0, in a chat 0.7
    top_k: int | None = None  # only the k likeliest tokens, 0: all; none: the model's, else 0
    top_p: float | None = None  # only the likeliest that together reach it; none: the model's, else 1.0, in a chat 0.9
    min_p: float | None = None  # only tokens this many times as likely as the likeliest; none: the model's, else 0.0
    repetition_penalty: float | None = None  # divides logits of tokens that were there; none: the model's, else 1.0
    presence_penalty: float = 0.0  # taken from the logits of tokens in the answer so far
    frequency_penalty: float = 0.0  # the same, for each time that they are there
    max_new_tokens: int = 128  # tokens; an answer that has not ended by then is cut off
    min_new_tokens: int = 0  # tokens; an answer does not end before
    stop: str = ""  # a text that ends an answer
    chat_template: str | None = None  # chatml, plain or the file of a Jinja template; none: the model's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # what it reads besides messages: enable_thinking
    parse_special_tokens: bool = False  # special tokens that are spelled out in messages become tokens
    seed: int = 0


def generate(command: GenerateCommand) -> None:
    is_chat = not (command.prompts or command.prompt)
    if command.prompts and command.prompt:
        raise ConfigError("give either --prompts FILE or --prompt TEXT")
    if is_chat and (command.n != 1 or command.out):
        name, use = ("n", "several answers") if command.n != 1 else ("out", "a file of answers")
        raise ConfigError(f"--{name}: a chat has one answer to each line; give --prompt or --prompts for {use}")
    inputs.check({"model": command.model}, {"prompts": command.prompts} if command.prompts else {})
    if command.out:
        inputs.require_free(command.out, "out")
    from rlhf_fast import models
    from rlhf_fast.data.records import read_prompts
    from rlhf_fast.data.templates import use_template
    from rlhf_fast.rollout.generator import Generator

    _params(command, FOR_CHAT)  # settings out of range are an error before the model is loaded
    records = [] if is_chat else read_prompts(command.prompts or [{"prompt": command.prompt}])
    model, tokenizer = models.load(command.model, merged=True)
    use_template(tokenizer, command.chat_template, command.template_kwargs, command.parse_special_tokens)
    chosen, told = choice_of_tokens(command, getattr(model, "generation_config", None), is_chat)
    print(told, file=sys.stderr)
    generator, params = Generator(model, tokenizer), _params(command, chosen)
    if is_chat:
        from rlhf_fast.cli.chat import chat

        chat(generator, params)
    else:
        _answer(generator, records, params, command.out)


def choice_of_tokens(command: GenerateCommand, of_model: Any, is_chat: bool) -> tuple[dict[str, Any], str]:
    """(how tokens are chosen, by setting; what a person is told of it), of settings, else of the model, else defaults.

    A generation config that does not sample says nothing of how to.
    """
    named = of_model.to_diff_dict() if of_model is not None else {}
    named = {key: value for key, value in named.items() if value is not None} if named.get("do_sample") else {}
    defaults, whose = (FOR_CHAT, "the default of a chat") if is_chat else (FOR_PROMPTS, "the default")
    chosen: dict[str, Any] = {}
    told = []
    for key, default in defaults.items():
        if (given := getattr(command, key)) is not None:
            chosen[key], source = given, "as you set it"
        elif key in named:
            chosen[key], source = named[key], "of the model's generation_config.json"
        else:
            chosen[key], source = default, whose
        if chosen[key] != FOR_PROMPTS[key] or key == "temperature":
            told.append(f"{key} {chosen[key]:g} ({source})")
    return chosen, f"Sampling: {', '.join(told)}"


def _params(command: GenerateCommand, chosen: dict[str, Any]) -> SamplingParams:
    from rlhf_fast.rollout.sampling import SamplingParams

    options = {item.name: getattr(command, item.name) for item in fields(command)}
    options |= {key: value for key, value in chosen.items() if options[key] is None}
    options["stop"] = (command.stop,) if command.stop else ()
    return SamplingParams(**{key: options[key] for key in SamplingParams.__dataclass_fields__ if key in options})


def _answer(generator: Any, records: list[Any], params: SamplingParams, out: str) -> None:
    """Write a row for each answer to the file `out`, or print it."""
    from rlhf_fast.runs.files import write_jsonl
    from rlhf_fast.runs.terminal import bar_updater, progress_bar

    with progress_bar(len(records) * params.n, "generate", "reply") as bar:
        rollouts = generator.generate(records, params, bar_updater(bar))
    rows = [
        {"prompt": records[i].prompt, "completion": text, "finish_reason": reason}
        for i, text, reason in zip(rollouts.prompt_index.tolist(), rollouts.texts, rollouts.finish_reasons, strict=True)
    ]
    if out:
        write_jsonl(Path(out), rows)
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
