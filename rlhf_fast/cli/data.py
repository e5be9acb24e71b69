"""The verb that says what a data file holds."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class DataCommand:
    """Say what a data file holds: counts, lengths in tokens, duplicates, what is wrong with which row.

    Every row is read with the tokenizer and the settings that training has; no weights are read. The exit code is 1 if
    there are rows that training would refuse (docs/data.md).

      rlhf-fast data comparisons.jsonl --model runs/sft --out report.html
    """

    data: str  # demonstrations, comparisons or prompts (docs/data.md); the one word that needs no key
    model: str = "smollm2-135m"  # folder, run, hub name or smollm2-135m, for its tokenizer
    out: str = ""  # a page beside what is shown here: FILE.html
    max_length: int = 1024  # tokens of a row, as sft, reward, dpo and ppo have it
    max_new_tokens: int = 128  # tokens that a prompt has to leave for an answer
    overlong: Literal["error", "truncate", "drop"] = "error"  # what is done with longer rows
    turns: Literal["all", "last"] = "all"  # which of the assistant's turns in a conversation are learned
    chat_template: str | None = None  # chatml, plain or the file of a Jinja template; none: the model's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # what it reads besides messages: enable_thinking
    parse_special_tokens: bool = False  # special tokens that are spelled out in messages become tokens
    records: int = 2  # records shown with their tokens, the first ones
    lines: tuple[int, ...] = ()  # those of these lines in their place: 12,40
    problems: int = 20  # problems shown at most
    json: bool = False  # for programs: one JSON object

    def __post_init__(self) -> None:
        for name, least in (("max_length", 1), ("max_new_tokens", 0), ("records", 0), ("problems", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)}; expected at least {least}")


def run(command: DataCommand) -> None:
    from rlhf_fast import models
    from rlhf_fast.data.rows import count_rows, scan_rows
    from rlhf_fast.data.survey import survey
    from rlhf_fast.data.templates import use_template
    from rlhf_fast.pages.data_report import as_text, in_colour, require_page, write_page
    from rlhf_fast.runs.terminal import bar_updater, progress_bar
    from rlhf_fast.trainers.loop.lengths import sizes_of

    if command.out:
        require_page(Path(command.out))
    next(scan_rows(command.data), None)  # a file that cannot be read is told before a tokenizer is
    tokenizer = models.load_tokenizer(command.model)
    context, vocabulary = sizes_of(command.model)
    use_template(tokenizer, command.chat_template, command.template_kwargs, command.parse_special_tokens)
    with progress_bar(count_rows(command.data), "data", "row") as bar:
        result = survey(
            command.data, tokenizer, max_length=command.max_length, max_new_tokens=command.max_new_tokens,
            overlong=command.overlong, context=context, vocabulary=vocabulary, turns=command.turns,
            examples=command.records, lines=command.lines, kept=command.problems, progress=bar_updater(bar),
        )  # fmt: skip
    if command.json:
        print(json.dumps({"data": command.data, "model": command.model, **asdict(result)}, indent=2))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        colour = in_colour(sys.stdout)
        print(as_text(result, command.data, command.model, colour, width, sys.stdout.encoding))
    if command.out:
        write_page(Path(command.out), result, command.data, command.model)
        print(f"Report: {command.out}", file=sys.stderr if command.json else sys.stdout)
    if result.refused:
        rows = f"{result.rows:,} row{'s' * (result.rows > 1)}"
        raise RuntimeError(f"{command.data}: training would refuse {result.refused:,} of {rows}")
