"""A step's tokens, packed in a row, and the places of their keys and values: arrays on the host, sent in two copies."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from rlhf_fast.ops.paged_attention import PagedBatch, Places
from rlhf_fast.rollout.sequence import Sequence

ALIGNED = 16  # bytes where each array begins: Triton compiles its kernels for it


class Placed(NamedTuple):
    """Input of a forward pass, on the model's device."""

    ids: torch.Tensor  # (N,) int64
    positions: torch.Tensor  # (N,) int64
    slots: torch.Tensor  # (N,) int64: block * block_size + position in the block
    batch: PagedBatch


@dataclass(frozen=True)
class StepBatch:
    """The N tokens of B sequences, which are G groups that share their first blocks; see PagedBatch."""

    ids: np.ndarray  # (N,)
    positions: np.ndarray  # (N,)
    slots: np.ndarray  # (N,)
    tables: np.ndarray  # (B, most blocks)
    cu_queries: np.ndarray  # (B + 1,)
    groups: np.ndarray  # (G + 1,)
    shared: np.ndarray  # (G,)

    @property
    def decodes(self) -> bool:
        """Return whether each sequence has one token."""
        return len(self.ids) == len(self.tables)

    def flat(self, pinned: bool) -> list[torch.Tensor]:
        """Flatten all of it, to a tensor of int64 and one of int32."""
        made = [_flat(arrays, dtype) for arrays, dtype in self._arrays()]
        return [x.pin_memory() for x in made] if pinned else made

    def cut(self, flat: list[torch.Tensor]) -> Placed:
        """Cut what `flat` made into parts again, wherever it has been copied to."""
        wide, narrow = (_cut(x, arrays, dtype) for x, (arrays, dtype) in zip(flat, self._arrays(), strict=True))
        ids, positions, slots = wide
        tables, cu_queries, contexts, groups, shared, *places = narrow
        return Placed(ids, positions, slots, PagedBatch(tables, cu_queries, contexts, groups, shared, Places(*places)))

    def to(self, device: torch.device) -> Placed:
        return self.cut([x.to(device, non_blocking=True) for x in self.flat(pinned=device.type == "cuda")])

    def padded(self, sequences: int, blocks: int, spare_block: int, block_size: int) -> StepBatch:
        """A step of decoding for so many sequences with tables of so many blocks; those that are added have one token
        in a spare block. Where sequences share, there are as many groups as there can be, the last ones empty."""
        n, more = len(self.ids), sequences - len(self.ids)
        tables = np.full((sequences, blocks), spare_block)
        tables[:n, : self.tables.shape[1]] = self.tables
        groups, shared = np.arange(sequences + 1), np.zeros(sequences, np.int64)
        if self.shared.any():
            groups = np.concatenate([self.groups, np.arange(n + 1, sequences + 1)])
            groups = np.concatenate([groups, np.full(sequences - len(groups), sequences)])  # (B,): B - 1 groups
            shared = np.concatenate([self.shared, np.zeros(sequences - 1 - len(self.shared), np.int64)])
        return StepBatch(
            np.concatenate([self.ids, np.zeros(more, np.int64)]),
            np.concatenate([self.positions, np.zeros(more, np.int64)]),
            np.concatenate([self.slots, np.full(more, spare_block * block_size)]),
            tables,
            np.arange(sequences + 1),
            groups,
            shared,
        )

    def _arrays(self) -> list[tuple[list[np.ndarray], type]]:
        contexts = self.positions[self.cu_queries[1:] - 1] + 1
        batch = [self.tables, self.cu_queries, contexts, self.groups, self.shared]
        of_sequences, numbers = np.repeat(self.shared, np.diff(self.groups)), np.arange(len(contexts))
        places = [self.positions, of_sequences, numbers, self.cu_queries[self.groups]]
        return [([self.ids, self.positions, self.slots], np.int64), ([*batch, *places], np.int32)]


def step_batch(work: list[tuple[Sequence, int]], block_size: int) -> tuple[list[int], StepBatch]:
    """The order that a step computes its sequences in, each with its next so many tokens, and all of these.

    Sequences of one family stand side by side, so that what they share is read once.
    """
    families: dict[object, list[int]] = {}
    for i, (sequence, _) in enumerate(work):
        families.setdefault(sequence.family or sequence, []).append(i)
    order = [i for members in families.values() for i in members]
    ids: list[int] = []
    for i in order:
        sequence, count = work[i]
        ids += sequence.tokens(sequence.computed, sequence.computed + count)
    counts = np.array([work[i][1] for i in order])
    starts = np.array([work[i][0].computed for i in order])
    cu_queries = np.concatenate([[0], np.cumsum(counts)])
    rows = np.repeat(np.arange(len(order)), counts)
    positions = np.arange(len(ids)) - (cu_queries[:-1] - starts)[rows]
    tables = _padded([work[i][0].blocks for i in order])
    slots = tables[rows, positions // block_size] * block_size + positions % block_size
    groups = np.cumsum([0, *map(len, families.values())])
    shared = np.zeros(len(families), np.int64)
    for g in np.flatnonzero(np.diff(groups) > 1):  # one alone shares with nobody
        members = slice(groups[g], groups[g + 1])
        shared[g] = _leading_equal(tables[members], int(starts[members].min()) // block_size)
    return order, StepBatch(np.array(ids), positions, slots, tables, cu_queries, groups, shared)


def _padded(rows: list[list[int]]) -> np.ndarray:
    """Rows of one length, with zeros behind."""
    lengths = np.array([len(row) for row in rows])
    table = np.zeros((len(rows), lengths.max()), np.int64)
    table[np.arange(table.shape[1]) < lengths[:, None]] = list(itertools.chain.from_iterable(rows))
    return table


def _leading_equal(tables: np.ndarray, most: int) -> int:
    """Count the leading blocks, at most so many, that are the same in all rows."""
    same = (tables[:, :most] == tables[:1, :most]).all(0)
    return most if same.all() else int(same.argmin())


def _room(array: np.ndarray, dtype: type) -> int:
    """Elements that an array takes, up to where the next one begins."""
    step = ALIGNED // np.dtype(dtype).itemsize
    return -(-array.size // step) * step


def _flat(arrays: list[np.ndarray], dtype: type) -> torch.Tensor:
    whole: np.ndarray = np.zeros(sum(_room(x, dtype) for x in arrays), dtype)
    at = 0
    for x in arrays:
        whole[at : at + x.size] = x.ravel()
        at += _room(x, dtype)
    return torch.from_numpy(whole)


def _cut(whole: torch.Tensor, arrays: list[np.ndarray], dtype: type) -> list[torch.Tensor]:
    parts, at = [], 0
    for x in arrays:
        parts.append(whole[at : at + x.size].view(x.shape))
        at += _room(x, dtype)
    return parts
