"""Token sequences with a prompt and a response, and the batches that models take. Knows no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

Item = TypeVar("Item")

# Tokens of a row that several responses share: attention with a mask looks at all pairs of them, and beyond this that
# costs more than reading the prompt again.
LONGEST_ROW = 1024


@dataclass(frozen=True)
class Example:
    """A prompt and a response as token ids; the response includes the end token when there is one.

    A response of several turns has the user's among them: `own` says which of its tokens are the assistant's.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    own: tuple[bool, ...] = ()  # of each response token; empty: all are

    def __post_init__(self) -> None:
        if self.own and len(self.own) != len(self.response):
            raise ValueError(f"own: {len(self.own)} for {len(self.response)} response tokens; expected one for each")

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def own_tokens(self) -> int:
        """Count the response's tokens that are the assistant's own."""
        return sum(self.own) if self.own else len(self.response)


@dataclass(frozen=True)
class Batch:
    """B examples in rows padded on the right. Examples of one prompt may share a row, in which the prompt stands once:

        prompt | response | response | ... | padding

    R is the number of response tokens of all examples together, of several turns those of the assistant's alone.
    """

    input_ids: torch.Tensor  # (rows, T) int64
    predicted_at: (
        torch.Tensor
    )  # (R,) int64: the place, row * T + column, of the token that predicts each response token
    last: torch.Tensor  # (B,) int64: the place of each example's last token
    response_tokens: torch.Tensor  # (R,) int64
    cu_seqlens: torch.Tensor  # (B + 1,) int32: where each example's response starts among the R
    positions: torch.Tensor | None = None  # (rows, T) int64: in its own sequence; None if each row is one
    mask: torch.Tensor | None = None  # (rows, 1, T, T) bool: who sees whom; None if all that stands before
    segments: tuple[int, ...] | None = None  # lengths of the sequences packed in the only row, none seeing another


def pad(examples: Sequence[Example], device: torch.device | str = "cpu", longest_shared: int = 0) -> Batch:
    """Pad examples to a batch, in their order. The padding is id 0; no real token ever sees it.

    Neighbours of one prompt share a row if no example of the batch is longer than `longest_shared` tokens: the mask
    that tells them apart stands for the window of a model that has one, in every row.

    Raises:
        ValueError: an empty prompt, after which no first response token could be predicted.
    """
    if (empty := next((i for i, example in enumerate(examples) if not example.prompt), None)) is not None:
        raise ValueError(f"example {empty} has an empty prompt; expected at least one token, such as the start token")
    rows = _rows(examples, longest_shared)
    width = max(_width(examples, row) for row in rows)
    ids, parts = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)  # part 0: the prompt
    positions = np.zeros((len(rows), width), np.int64)  # those of padding are no longer than the sequences are
    responses = [np.array(example.response, np.int64) for example in examples]
    own = [np.array(example.own, bool) if example.own else slice(None) for example in examples]
    predicted_at: list[np.ndarray] = []
    last: list[int] = []
    for r, row in enumerate(rows):
        prompt = examples[row[0]].prompt
        start = asked = len(prompt)
        ids[r, :asked], positions[r, :asked] = prompt, np.arange(asked)
        for part, i in enumerate(row, start=1):
            end = start + len(responses[i])
            ids[r, start:end], parts[r, start:] = responses[i], part
            positions[r, start:end] = np.arange(asked, asked + end - start)
            places = np.arange(start - 1, end - 1)
            places[:1] = asked - 1  # the first response token comes after the prompt, wherever it stands
            predicted_at.append(r * width + places[own[i]])
            last.append(r * width + (end if end > start else asked) - 1)
            start = end
    learned = [response[which] for response, which in zip(responses, own, strict=True)]
    counts = np.cumsum([0, *map(len, learned)], dtype=np.int32)
    batch = Batch(
        input_ids=torch.from_numpy(ids).to(device),
        predicted_at=torch.from_numpy(np.concatenate(predicted_at)).to(device),
        last=torch.tensor(last, device=device),
        response_tokens=torch.from_numpy(np.concatenate(learned)).to(device),
        cu_seqlens=torch.from_numpy(counts).to(device),
    )
    if len(rows) == len(examples):
        return batch
    which = torch.from_numpy(parts).to(device)  # (rows, T)
    sees = (which.unsqueeze(1) == 0) | (which.unsqueeze(1) == which.unsqueeze(2))  # (rows, T, T)
    return replace(batch, positions=torch.from_numpy(positions).to(device), mask=sees.tril().unsqueeze(1))


def by_prompt(examples: Sequence[Example]) -> list[list[int]]:
    """Group the numbers of examples by prompt, in order of first appearance."""
    members: dict[tuple[int, ...], list[int]] = {}
    for i, example in enumerate(examples):
        members.setdefault(example.prompt, []).append(i)
    return list(members.values())


def _rows(examples: Sequence[Example], longest_shared: int) -> list[list[int]]:
    """Group neighbours that share a row."""
    if max(map(len, examples)) > longest_shared:
        return [[i] for i in range(len(examples))]
    rows: list[list[int]] = []
    width = 0
    for i, example in enumerate(examples):
        alike = bool(rows) and example.prompt == examples[rows[-1][0]].prompt
        if alike and width + len(example.response) <= LONGEST_ROW:
            rows[-1].append(i)
            width += len(example.response)
        else:
            rows.append([i])
            width = len(example)
    return rows


def _width(examples: Sequence[Example], row: Sequence[int]) -> int:
    return len(examples[row[0]].prompt) + sum(len(examples[i].response) for i in row)


def shape(examples: Sequence[Example], longest_shared: int) -> tuple[int, int]:
    """Compute the shape (rows, T) of the batch that `pad` makes of these examples."""
    rows = _rows(examples, longest_shared)
    return len(rows), max(_width(examples, row) for row in rows)


def shuffled(items: Sequence[Item], seed: int | tuple[int, ...]) -> list[Item]:
    """Shuffle `items` by a permutation that depends on the seed only."""
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


def microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group row numbers so that rows x longest row stays within `max_tokens` (a longer row goes alone).

    Rows of like length go together, so that little of a batch is padding.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def microbatches_of_examples(examples: Sequence[Example], max_tokens: int, longest_shared: int = 0) -> list[list[int]]:
    """Group example numbers so that the batch of each group stays within `max_tokens` (a longer row goes alone).

    Examples of one prompt become neighbours, for `pad` to let them share a row; those longer than `longest_shared` go
    apart.
    """
    short, long = (
        [i for members in by_prompt(examples) for i in members if (len(examples[i]) > longest_shared) == apart]
        for apart in (False, True)
    )
    grouped = []
    for order in (short, long):
        part = [examples[i] for i in order]
        rows = [[order[i] for i in row] for row in _rows(part, longest_shared)] if part else []
        groups = microbatches([_width(examples, row) for row in rows], max_tokens)
        grouped += [[i for row in group for i in rows[row]] for group in groups]
    return grouped
