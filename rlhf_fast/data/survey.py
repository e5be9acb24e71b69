"""Survey a data file before anything is trained on it: counts, lengths, duplicates, and each row that is wrong.

Rows are read and tokenised one after the other by what the trainers read and tokenise them with, but a row that cannot
be used is noted and the next one read. Knows no page and no terminal: pages/data_report.py shows what is found.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.conversations import Tokenized
from rlhf_fast.data.fitting import Fitting, Overlong
from rlhf_fast.data.records import Comparison, Demonstration, PromptRecord, RecordError, Source, read_record
from rlhf_fast.data.rows import count_rows, scan_rows
from rlhf_fast.data.templates import added_tokens, pattern_of
from rlhf_fast.data.tokenize import tokenize_record

Kind = Literal["demonstrations", "comparisons", "prompts"]
Progress = Callable[[int, int], None]
BINS = 32  # of a histogram
KEPT = 1000  # problems that are kept with their words; the rest is counted
_KINDS: dict[type, Kind] = {Demonstration: "demonstrations", Comparison: "comparisons", PromptRecord: "prompts"}


@dataclass(frozen=True)
class Problem:
    """Problem of one row."""

    line: int  # of the file, from 1; of a list the number of the row, from 0
    what: str


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens of one part of each row."""

    p5: int
    p50: int
    p95: int
    max: int
    total: int
    edges: list[int]  # where the histogram's bins begin, up to the 99th percentile, and where the last ends
    # How many rows are in each bin; in the last one also those beyond it.
    counts: list[int]


@dataclass(frozen=True)
class Piece:
    """Tokens that follow one another, as text."""

    text: str
    learned: bool
    special: bool


@dataclass(frozen=True)
class Example:
    """A row as training reads it: its conversations by name."""

    line: int
    conversations: dict[str, list[Piece]]


@dataclass(frozen=True)
class Survey:
    """Survey of a data file: counts, lengths in tokens, duplicates and problems."""

    kind: Kind | None  # of most rows; None where no row can be used
    rows: int
    usable: int  # rows that are trained on
    refused: int  # rows of which training says that it cannot use them, and stops
    splits: dict[str, int]  # rows of each "split", "" where a row names none
    lengths: dict[str, Lengths]  # of prompt, response (or chosen, rejected), and whole row
    duplicate_rows: int  # rows that are the same as one before them
    duplicate_prompts: int
    identical_sides: int  # comparisons whose two answers are the same, which training leaves out
    spelled_out: int  # rows in whose texts somebody typed a special token
    max_length: int
    overlong: str  # what is done with longer rows: error, truncate or drop
    limit: int  # tokens that a row may have: max_length, or the model's positions if these are fewer
    longer: int  # rows with more tokens
    beyond: int  # tokens of them that are lost if they are cut
    lost: int  # rows of which nothing is left then
    problems: list[Problem] = field(default_factory=list)  # the first ones, by line
    examples: list[Example] = field(default_factory=list)
    not_shown: list[int] = field(default_factory=list)  # lines that were asked for, and are no rows that can be used
    seconds: float = 0.0

    @property
    def more_problems(self) -> int:
        """Count the problems that are not in `problems`."""
        return self.refused - len(self.problems)


def survey(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    max_new_tokens: int = 0,
    overlong: Overlong = "error",
    context: int | None = None,
    vocabulary: int | None = None,
    turns: Literal["all", "last"] = "all",
    examples: int = 3,
    lines: Collection[int] = (),
    kept: int = KEPT,
    progress: Progress | None = None,
) -> Survey:
    """Read all of `source`, whatever is wrong with its rows.

    Args:
        tokenizer: set up as the run's is (`data.templates.use_template`).
        max_length: tokens of a row; of prompts with `max_new_tokens` for an answer.
        overlong: what is done with longer rows.
        context: positions that the model has; None: any number.
        vocabulary: tokens that it has.
        examples: rows that are given back with their tokens, the first ones that can be used.
        lines: these in their place.
        kept: problems that are given back at most.
        progress: `progress(done, total)` is called as rows are read.

    Raises:
        RecordError: the file cannot be read at all, or has no rows.
    """
    started, total = time.monotonic(), count_rows(source)
    fitting = Fitting(tokenizer, max_length, "truncate", context=context, vocabulary=vocabulary)
    tallies: dict[Kind, _Tally] = {kind: _Tally(kept) for kind in _KINDS.values()}
    unreadable, rows = _Problems(kept), 0
    for number, name, row in scan_rows(source):
        rows += 1
        try:
            if isinstance(row, RecordError):
                raise row
            record = read_record(row, name)
            conversations = tokenize_record(record, tokenizer, turns=turns)
            fitting.check_tokens([each.input_ids for each in conversations], name)
        except ValueError as error:
            unreadable.add(number, str(error).removeprefix(f"{name}: "))
        else:
            tally = tallies[_KINDS[type(record)]]
            tally.add(number, row, record, conversations, tokenizer)
            tally.fit(number, record, conversations, fitting, max_new_tokens, turns)
            if number in lines if lines else len(tally.examples) < examples:
                tally.examples.append(_example(number, record, conversations, tokenizer))
        if progress:
            progress(rows, max(rows, total))
    if not rows:
        raise RecordError(f"{source if isinstance(source, str) else 'the data'}: no rows; expected at least one")
    kind = max(tallies, key=lambda kind: tallies[kind].rows)
    main = tallies[kind]
    others = [_problems_of_kind(other, kind, tally) for other, tally in tallies.items() if other != kind]
    parts = [unreadable, *others, *([main.longer] if overlong == "error" else [])]
    refused, dropped = sum(part.count for part in parts), main.longer.count
    return Survey(
        kind=kind if main.rows else None,
        rows=rows,
        usable=rows - refused - main.identical_sides - {"error": 0, "truncate": main.lost, "drop": dropped}[overlong],
        refused=refused,
        splits=dict(main.splits),
        lengths={name: _lengths(values) for name, values in main.tokens.items()},
        duplicate_rows=main.rows - len(main.seen_rows),
        duplicate_prompts=main.rows - len(main.seen_prompts),
        identical_sides=main.identical_sides,
        spelled_out=main.spelled_out,
        max_length=max_length,
        overlong=overlong,
        limit=fitting.limit,
        longer=main.longer.count,
        beyond=main.beyond,
        lost=main.lost,
        problems=sorted((problem for part in parts for problem in part.first), key=lambda problem: problem.line)[:kept],
        examples=main.examples,
        not_shown=sorted(set(lines) - {example.line for example in main.examples}),
        seconds=time.monotonic() - started,
    )


class _Problems:
    """The first of them, and how many there are."""

    def __init__(self, kept: int) -> None:
        self.kept, self.count = kept, 0
        self.first: list[Problem] = []

    def add(self, line: int, what: str) -> None:
        self.count += 1
        if len(self.first) < self.kept:
            self.first.append(Problem(line, what))


class _Tally:
    """The rows of one kind."""

    def __init__(self, kept: int) -> None:
        self.rows = self.identical_sides = self.spelled_out = self.beyond = self.lost = 0
        self.splits: Counter[str] = Counter()
        self.seen_rows: set[bytes] = set()
        self.seen_prompts: set[bytes] = set()
        self.tokens: dict[str, array[int]] = {}
        self.lines, self.longer = _Problems(kept), _Problems(kept)
        self.examples: list[Example] = []

    def add(
        self,
        line: int,
        row: Mapping[str, Any],
        record: PromptRecord | Demonstration | Comparison,
        conversations: list[Tokenized],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.rows += 1
        self.lines.add(line, "")
        self.splits[str(row.get("split") or "")] += 1
        text = repr(sorted(row.items(), key=lambda item: str(item[0])))
        self.seen_rows.add(_digest(text))
        first = _first_learned(conversations[0])
        self.seen_prompts.add(_digest(repr(conversations[0].input_ids[:first])))
        if pattern_of(added_tokens(tokenizer).special).search(text):
            self.spelled_out += 1
        for name, count in _parts(record, conversations, first).items():
            self.tokens.setdefault(name, array("q")).append(count)

    def fit(
        self,
        line: int,
        record: PromptRecord | Demonstration | Comparison,
        conversations: list[Tokenized],
        fitting: Fitting,
        max_new_tokens: int,
        turns: Literal["all", "last"],
    ) -> None:
        """Hold a row against what fits, and cut it if it is too long."""
        answer = max_new_tokens if isinstance(record, PromptRecord) else 0
        if (tokens := max(map(len, conversations)) + answer) <= fitting.limit:
            self.identical_sides += isinstance(record, Comparison) and conversations[0] == conversations[1]
            return
        fewer = fitting.limit < fitting.max_length
        limit = f"the model's {fitting.limit} positions" if fewer else f"max_length = {fitting.max_length}"
        self.longer.add(line, f"{tokens} tokens{f', {answer} of them for an answer' * bool(answer)}, more than {limit}")
        left = _cut(record, fitting, max_new_tokens, turns)
        self.beyond += sum(map(len, conversations)) - left
        self.lost += not left


def _cut(
    record: PromptRecord | Demonstration | Comparison,
    fitting: Fitting,
    max_new_tokens: int,
    turns: Literal["all", "last"],
) -> int:
    """Count the tokens that training reads of a row that is too long."""
    if isinstance(record, Demonstration):
        return sum(map(len, fitting.demonstration(record, turns)))
    if isinstance(record, Comparison):
        kept = fitting.comparison(record)
        return sum(map(len, kept[1])) if kept else 0
    return sum(len(tokenize_record(kept, fitting.tokenizer)[0]) for kept in fitting.prompts([record], max_new_tokens))


def _first_learned(conversation: Tokenized) -> int:
    return conversation.loss_mask.index(True) if any(conversation.loss_mask) else len(conversation)


def _parts(record: Any, conversations: list[Tokenized], first: int) -> dict[str, int]:
    """Count the tokens in each part of a row. The prompt is what stands before the first token that is learned."""
    if isinstance(record, PromptRecord):
        return {"prompt": first}
    if isinstance(record, Comparison):
        chosen, rejected = (each.learned for each in conversations)
        return {"prompt": first, "chosen": chosen, "rejected": rejected, "longer side": max(map(len, conversations))}
    learned = sum(each.learned for each in conversations)
    return {"prompt": first, "learned": learned, "whole": max(map(len, conversations))}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _problems_of_kind(other: Kind, kind: Kind, tally: _Tally) -> _Problems:
    problems = _Problems(tally.lines.kept)
    problems.count = tally.rows
    words = f"one of the {other}, where most rows are {kind}; put them into a file of their own"
    problems.first = [Problem(problem.line, words) for problem in tally.lines.first]
    return problems


def _lengths(values: array[int]) -> Lengths:
    lengths = np.frombuffer(values, np.int64)
    low, middle, high, end = (int(x) for x in np.percentile(lengths, [5, 50, 95, 99], method="inverted_cdf"))
    least = int(lengths.min())
    width = -(-(end - least + 1) // BINS)  # whole tokens, or neighbouring bins would hold more and fewer of them
    edges = np.arange(least, end + width + 1, width)
    counts, _ = np.histogram(np.minimum(lengths, end), edges)
    return Lengths(low, middle, high, int(lengths.max()), int(lengths.sum()), edges.tolist(), counts.tolist())


# A few rows, token by token -------------------------------------------------------------------------------------------


def _example(line: int, record: Any, conversations: list[Tokenized], tokenizer: PreTrainedTokenizerBase) -> Example:
    names: tuple[str, ...] = ("chosen", "rejected") if isinstance(record, Comparison) else ("",)
    if len(conversations) > len(names):
        names = tuple(f"{i} of {len(conversations)}" for i in range(1, len(conversations) + 1))
    pieces = (list(_pieces(each, tokenizer)) for each in conversations)
    return Example(line, dict(zip(names, pieces, strict=True)))


def _pieces(conversation: Tokenized, tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    special, ids, before, end = added_tokens(tokenizer).special_ids, conversation.input_ids, "", 0
    marked = zip(ids, conversation.loss_mask, strict=True)
    for (learned, is_special), run in itertools.groupby(marked, lambda token: (token[1], token[0] in special)):
        begin, end = end, end + len(list(run))
        # Behind what stands before it: alone, some tokenizers would leave out a space that it begins with.
        text = _decoded(tokenizer, ids[:end])
        alone = text[len(before) :] if text.startswith(before) else _decoded(tokenizer, ids[begin:end])
        yield Piece(alone, learned, is_special)
        before = text


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
