"""Token sequences with a prompt and a response, and the padded batches that models take. Knows no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """A prompt and a response as token ids; the response includes the end token when there is one."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right. R is the number of response tokens of all rows together."""

    input_ids: torch.Tensor  # (B, T) int64
    lengths: torch.Tensor  # (B,) int64: real tokens of each row
    response_mask: torch.Tensor  # (B, T) bool
    response_tokens: torch.Tensor  # (R,) int64
    cu_seqlens: torch.Tensor  # (B + 1,) int32: where each row's response starts among the R


def pad(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    """Pad examples to the longest. The padding is id 0; no real token ever sees it."""
    width = max(len(example) for example in examples)
    input_ids = torch.zeros(len(examples), width, dtype=torch.int64)
    response_mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, example in enumerate(examples):
        input_ids[row, : len(example)] = torch.tensor(example.prompt + example.response)
        response_mask[row, len(example.prompt) : len(example)] = True
    counts = torch.tensor([0] + [len(example.response) for example in examples])
    return Batch(
        input_ids=input_ids.to(device),
        lengths=torch.tensor([len(example) for example in examples], device=device),
        response_mask=response_mask.to(device),
        response_tokens=input_ids[response_mask].to(device),
        cu_seqlens=counts.cumsum(0).to(torch.int32).to(device),
    )


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """A permutation of `items` that depends on the seed only."""
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
