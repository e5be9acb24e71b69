"""The verb generate: answers to the prompts of a file, to one prompt, or to what is typed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rlhf_fast.cli import inputs
from rlhf_fast.settings import ConfigError


@dataclass(frozen=True)
class GenerateCommand:
    """Sample answers to the prompts of a file, to one prompt, or to what is typed."""

    prompts: str = ""  # {"prompt"} a line
    prompt: str = ""  # one prompt, in place of a file; with neither, prompts are read from the terminal
    out: str = ""  # JSON Lines; empty: standard output
    model: str = "smollm2-135m"  # folder, run, hub name or smollm2-135m
    n: int = 1  # answers to each prompt
    temperature: float = 1.0  # 0.0 takes the likeliest token
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability; 1.0: all
    min_p: float = 0.0  # only tokens at least this many times as likely as the likeliest; 0.0: all
    repetition_penalty: float = 1.0  # logits of tokens that were there are divided by it; 1.0: none
    presence_penalty: float = 0.0  # taken from the logits of tokens in the answer so far
    frequency_penalty: float = 0.0  # the same, for each time that they are there
    max_new_tokens: int = 128  # tokens; an answer that has not ended by then is cut off
    min_new_tokens: int = 0  # tokens; no end before
    stop: str = ""  # a text that ends an answer
    chat_template: str | None = None  # chatml, plain or the file of a Jinja template; none: the model's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # what it reads besides messages: enable_thinking
    parse_special_tokens: bool = False  # special tokens that are spelled out in messages become tokens
    seed: int = 0


def generate(command: GenerateCommand) -> None:
    if command.prompts and command.prompt:
        raise ConfigError("give either --prompts FILE or --prompt TEXT")
    inputs.check({"model": command.model}, {"prompts": command.prompts} if command.prompts else {})
    from rlhf_fast import models
    from rlhf_fast.data.records import read_prompts
    from rlhf_fast.data.templates import use_template
    from rlhf_fast.files import write_jsonl
    from rlhf_fast.rollout.generator import Generator
    from rlhf_fast.rollout.sampling import SamplingParams
    from rlhf_fast.terminal import bar_updater, progress_bar

    options = {item.name: getattr(command, item.name) for item in fields(command)}
    options["stop"] = (command.stop,) if command.stop else ()
    params = SamplingParams(**{key: options[key] for key in SamplingParams.__dataclass_fields__ if key in options})
    asks = not (command.prompts or command.prompt)
    records = [] if asks else read_prompts(command.prompts or [{"prompt": command.prompt}])
    model, tokenizer = models.load(command.model, merged=True)
    use_template(tokenizer, command.chat_template, command.template_kwargs, command.parse_special_tokens)
    generator = Generator(model, tokenizer)
    if asks:
        return _talk(generator, params)
    with progress_bar(len(records) * params.n, "generate", "reply") as bar:
        rollouts = generator.generate(records, params, bar_updater(bar))
    rows = [
        {"prompt": records[i].prompt, "completion": text, "finish_reason": reason}
        for i, text, reason in zip(rollouts.prompt_index.tolist(), rollouts.texts, rollouts.finish_reasons, strict=True)
    ]
    if command.out:
        write_jsonl(Path(command.out), rows)
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))


def _talk(generator: Any, params: Any) -> None:
    """Answer what is typed, each line a prompt of its own, until the end of the input."""
    if sys.stdin.isatty():
        print("A prompt a line; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not prompt.strip():
            continue
        shown = ""
        for piece in generator.stream([prompt], params):
            if params.n == 1:
                print(_printable(piece.text.removeprefix(shown)), end="", flush=True)
                shown = piece.text
            elif params.n > 1 and piece.finish_reason:
                print(f"[{piece.sample + 1}] {_printable(piece.text)}")
        print()


def _printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
