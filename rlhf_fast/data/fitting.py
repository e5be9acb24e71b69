"""Rows against what a model can read: those that are too long are refused, cut or left out, and counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.batches import Example
from rlhf_fast.data.comparisons import Comparison
from rlhf_fast.data.conversations import Tokenized
from rlhf_fast.data.messages import is_learned
from rlhf_fast.data.records import Demonstration, PromptRecord
from rlhf_fast.data.templates import Message, Prompt
from rlhf_fast.data.tokenize import tokenize_comparison, tokenize_prompt, tokenize_record

Overlong = Literal["error", "truncate", "drop"]


@dataclass
class Fitting:
    """Limits of how long rows may be, what becomes of longer ones, and how many there were.

    Cut, a prompt loses its oldest turns, never the system's message; if its last turn is too long alone, the beginning
    of that. Answers keep half of the length, if they need it; what is still too long loses its tail, and with it the
    token that ends it, so that nobody learns to stop there. What nothing is left of is left out.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int  # tokens
    overlong: Overlong = "error"
    phase: str = "sft"
    context: int | None = None  # positions that the model has; None: any number
    vocabulary: int | None = None  # tokens that it has
    rows: int = 0
    truncated: int = 0
    dropped: int = 0
    identical: int = 0  # comparisons of an answer with itself, which are left out

    @property
    def limit(self) -> int:
        return self.max_length if self.context is None else min(self.max_length, self.context)

    def demonstration(self, row: Demonstration, turns: Literal["all", "last"] = "all") -> tuple[Tokenized, ...]:
        """The row's conversations; none of one that is left out."""
        self.rows += 1
        tokenized = tokenize_record(row, self.tokenizer, turns=turns)
        self.check_tokens([conversation.input_ids for conversation in tokenized], row.name)
        tokens = max(map(len, tokenized))
        if not self._cuts(tokens, f"{row.name or 'a demonstration'}: prompt and response have {tokens} tokens"):
            return tuple(tokenized) if tokens <= self.limit else ()
        row = _last_answer_alone(row) if turns == "last" else row
        if (short := self._short_prompt(row, tokens)) is not row.prompt:
            if short is None:
                return self._drop()
            tokenized = tokenize_record(replace(row, prompt=short), self.tokenizer, turns=turns)
        cut = [Tokenized(each.input_ids[: self.limit], each.loss_mask[: self.limit]) for each in tokenized]
        return tuple(each for each in cut if each.learned) or self._drop()

    def comparison(self, row: Comparison, scored: bool = False) -> tuple[Comparison, list[Example]] | None:
        """The row with its prompt as it is read, and the chosen and the rejected answer; None if it is left out."""
        self.rows += 1
        sides = tokenize_comparison(row, self.tokenizer, scored=scored)
        self.check_tokens([side.prompt + side.response for side in sides], row.name)
        tokens = max(map(len, sides))
        if self._cuts(tokens, f"{row.name or 'a comparison'}: prompt and response have {tokens} tokens"):
            if (short := self._short_prompt(row, tokens)) is not row.prompt:
                if short is None:
                    self._drop()
                    return None
                row = replace(row, prompt=short)
                sides = tokenize_comparison(row, self.tokenizer, scored=scored)
            room = self.limit - len(sides[0].prompt)
            sides = [Example(side.prompt, side.response[:room], side.own[:room]) for side in sides]
        elif tokens > self.limit:
            return None
        if sides[0] == sides[1]:
            self.identical += 1
            return None
        return row, sides

    def prompts(self, records: Sequence[PromptRecord], response: int) -> list[PromptRecord]:
        """Prompts that leave room for a response of so many tokens."""
        return [kept for record in records if (kept := self._prompt(record, response)) is not None]

    def _prompt(self, record: PromptRecord, response: int) -> PromptRecord | None:
        self.rows += 1
        count = self._counter(record)
        (ids,) = (conversation.input_ids for conversation in tokenize_record(record, self.tokenizer))
        self.check_tokens([ids], record.name)
        tokens = len(ids) + response
        if not self._cuts(
            tokens, f"{record.name or 'a prompt'}: with max_new_tokens = {response} it comes to {tokens} tokens"
        ):
            return record if tokens <= self.limit else None
        short = shortened(record.prompt, count, self.limit - response)
        if short is None:
            self._drop()
            return None
        return replace(record, prompt=short)

    # What became of rows ----------------------------------------------------------------------------------------------

    def done(self) -> None:
        """Say on stderr what became of rows, if of any.

        Raises:
            ValueError: none is left.
        """
        if self.rows == self.dropped + self.identical:
            why = "compare an answer with itself" if not self.dropped else f"have more than {self.limit} tokens"
            raise ValueError(f"{self.phase}: no row is left: all {self.rows} {why}; look at the data, or at max_length")
        if said := self.told():
            print(f"{self.phase}: {said}", file=sys.stderr)

    def told(self) -> str:
        """Say what became of rows, in words; empty where all are as they were."""
        cut = f"{self.truncated} cut to {self.limit} tokens" if self.truncated else ""
        out = f"{self.dropped} left out, being longer than {self.limit} tokens" if self.dropped else ""
        same = f"{self.identical} left out, as chosen and rejected are the same" if self.identical else ""
        said = "; ".join(part for part in (cut, out, same) if part)
        return said and f"of {self.rows} rows {said}"

    def summary(self) -> dict[str, int]:
        """Count what became of rows, for a run's result; empty where all are as they were."""
        counts = {"truncated": self.truncated, "dropped": self.dropped, "identical": self.identical}
        return {f"rows_{name}": count for name, count in counts.items() if count}

    # Checks and cuts --------------------------------------------------------------------------------------------------

    def _cuts(self, tokens: int, said: str) -> bool:
        """Return whether a row of so many tokens is to be cut; one that is left out is counted as that.

        Raises:
            ValueError: it is too long, and that is an error; begins with what is `said`.
        """
        if tokens <= self.limit:
            return False
        if self.overlong == "error":
            limit, way = f"{self.phase}.max_length = {self.max_length}", "raise max_length"
            if self.limit < self.max_length:
                limit, way = f"the {self.context} positions that the model has", "take a model with more"
            raise ValueError(
                f"{said}, more than {limit}; shorten the text, {way}, or set {self.phase}.overlong: truncate, or drop"
            )
        if self.overlong == "drop":
            self.dropped += 1
            return False
        self.truncated += 1
        return True

    def _drop(self) -> tuple[()]:
        """Count a row as left out that was to be cut."""
        self.truncated -= 1
        self.dropped += 1
        return ()

    def check_tokens(self, rows: Sequence[Sequence[int]], name: str) -> None:
        """Refuse tokens that the model has no embedding for."""
        if self.vocabulary is not None and (most := max(map(max, rows))) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(most)
            raise ValueError(
                f"{name or 'a row'}: its token {most} ({token!r}) is beyond the model's {self.vocabulary} embeddings; "
                "the tokenizer is another model's, or was given more tokens: then call model.resize_token_embeddings("
                "len(tokenizer)) and save both"
            )

    def _counter(self, row: PromptRecord | Demonstration | Comparison) -> Callable[[Prompt], int]:
        """Return a function that counts the tokens of a prompt in place of the row's."""
        return lambda prompt: len(
            tokenize_prompt(self.tokenizer, prompt, row.tools, row.template_kwargs, name=row.name)
        )

    def _short_prompt(self, row: Demonstration | Comparison, tokens: int) -> Prompt | None:
        """The row's prompt as it is, if it leaves half of the length to answers, or all that they need; else cut."""
        count = self._counter(row)
        asked = count(row.prompt)
        room = self.limit - min(tokens - asked, max(self.limit // 2, 1))
        return row.prompt if asked <= room else shortened(row.prompt, count, room)


def shortened(prompt: Prompt, count: Callable[[Prompt], int], room: int) -> Prompt | None:
    """A prompt of at most `room` tokens: without its oldest turns, or without the beginning of its last. None if even
    that is too long."""
    if isinstance(prompt, str):
        return _words(count, prompt, room)
    kept = next((i for i, message in enumerate(prompt) if message["role"] != "system"), len(prompt))
    system, rest = prompt[:kept], prompt[kept:]
    turns = [i for i, message in enumerate(rest) if message["role"] == "user"]
    for first in turns:
        if first and count([*system, *rest[first:]]) <= room:
            return [*system, *rest[first:]]
    if not turns:
        return None
    asked, after = rest[turns[-1]], rest[turns[-1] + 1 :]

    def with_words(words: str) -> list[Message]:
        return [*system, {**asked, "content": words}, *after]

    words = _words(lambda words: count(with_words(words)), asked.get("content") or "", room)
    return None if words is None else with_words(words)


def _words(count: Callable[[str], int], text: str, room: int) -> str | None:
    """Keep as much of a text's end as comes to at most `room` tokens, in whole characters; None if nothing does."""
    text = text.rstrip()
    if not text or count(text[-1:]) > room:
        return None
    if count(text) <= room:
        return text
    cut, enough = 0, len(text) - 1  # cut off so much, and it is too long; so much, and it fits
    while enough - cut > 1:
        middle = (cut + enough) // 2
        if count(text[middle:].strip() or text[-1:]) <= room:
            enough = middle
        else:
            cut = middle
    return text[enough:].strip()


def _last_answer_alone(row: Demonstration) -> Demonstration:
    """A demonstration of several turns as one of its last answer alone."""
    answers, prompt = row.completion, row.prompt
    if isinstance(answers, str) or len(answers) == 1 or not is_learned(answers[-1]):
        return row
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[-1]["role"] == "assistant":  # which the first answer goes on with
        return row
    return replace(row, prompt=[*messages, *answers[:-1]], completion=answers[-1:])
