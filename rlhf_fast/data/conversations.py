"""Conversations as token ids with what is learned of each, and the batches of them. Knows no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_fast.data.batches import Batch, microbatches


@dataclass(frozen=True)
class Tokenized:
    """Conversation as tokens, and which of them are learned: answers through their end tokens, never the first."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]  # of each token

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.loss_mask):
            raise ValueError(
                f"loss_mask: {len(self.loss_mask)} for {len(self.input_ids)} tokens; expected one for each"
            )
        if self.loss_mask and self.loss_mask[0]:
            raise ValueError(
                "loss_mask: the first token is to be learned, which nothing stands before; expected False for it"
            )

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def learned(self) -> int:
        """Count the tokens that have a loss."""
        return sum(self.loss_mask)


def batch_of(conversations: Sequence[Tokenized], device: torch.device | str = "cpu", packed: bool = False) -> Batch:
    """Conversations as a batch whose response tokens are those that are learned: each in a row of its own, padded on
    the right with id 0, or packed one after another in a single row without padding.

    In a packed row positions begin anew with each conversation, and `segments` says where attention ends.
    """
    lengths = [len(conversation) for conversation in conversations]
    width = sum(lengths) if packed else max(lengths)
    starts = np.cumsum([0, *lengths[:-1]]) if packed else width * np.arange(len(lengths))
    ids = np.zeros(width if packed else width * len(lengths), np.int64)
    learned = [start + np.flatnonzero(each.loss_mask) for start, each in zip(starts, conversations, strict=True)]
    for start, conversation in zip(starts, conversations, strict=True):
        ids[start : start + len(conversation)] = conversation.input_ids
    places = np.concatenate(learned)  # (R,)
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])[None]) if packed else None
    return Batch(
        input_ids=torch.from_numpy(ids.reshape(-1, width)).to(device),
        predicted_at=torch.from_numpy(places - 1).to(device),
        last=torch.from_numpy(starts + np.array(lengths) - 1).to(device),
        response_tokens=torch.from_numpy(ids[places]).to(device),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *map(len, learned)], dtype=np.int32)).to(device),
        positions=None if positions is None else positions.to(device),
        segments=tuple(lengths) if packed else None,
    )


def microbatches_of_conversations(
    lengths: Sequence[int], max_tokens: int, longest: int = 0
) -> list[tuple[list[int], bool]]:
    """Group conversation numbers into micro-batches of at most `max_tokens` tokens (a longer conversation goes alone);
    with each, whether it is packed. Conversations of at most `longest` tokens are, longer ones are padded."""
    packed = best_fit({i: length for i, length in enumerate(lengths) if length <= longest}, max_tokens)
    rest = [i for i, length in enumerate(lengths) if length > longest]
    padded = microbatches([lengths[i] for i in rest], max_tokens)
    return [(group, len(group) > 1) for group in packed] + [([rest[i] for i in group], False) for group in padded]


def best_fit(lengths: dict[int, int], room: int) -> list[list[int]]:
    """Numbers in groups whose lengths come to at most `room` (a longer one alone): from the longest on, each goes to
    the group that it leaves the least room in (best fit decreasing)."""
    groups: list[list[int]] = []
    left: list[int] = []
    for i in sorted(lengths, key=lambda i: lengths[i], reverse=True):
        fits = [g for g, free in enumerate(left) if free >= lengths[i]]
        if fits:
            best = min(fits, key=lambda g: left[g])
            groups[best].append(i)
            left[best] -= lengths[i]
        else:
            groups.append([i])
            left.append(room - lengths[i])
    return groups
