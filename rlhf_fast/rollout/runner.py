"""Runs a model over a step's packed tokens: places for their keys and values, positions, and the states to sample
from."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from rlhf_fast.models.adapters import Model
from rlhf_fast.models.forward import output_head, unwrapped
from rlhf_fast.ops.paged_attention import KVCache, PagedBatch
from rlhf_fast.rollout import attention, layers
from rlhf_fast.rollout.probe import probe
from rlhf_fast.rollout.scheduler import Work
from rlhf_fast.rollout.sequence import Sequence


class ModelRunner:
    """A model, and the keys and values of all its layers."""

    def __init__(self, model: Model, fast: bool = True, value_head: nn.Module | None = None) -> None:
        self.model, self.inner, self.value_head = model, unwrapped(model), value_head
        self.device = output_head(model).weight.device
        self.served = probe(self.inner, self.device, fast)
        self.caches: dict[int, KVCache] = {}
        self.blocks = self.block_size = 0
        head, embedding = output_head(model).weight, self.inner.get_input_embeddings().weight
        used = {id(p): p for p in self.inner.parameters() if p is not embedding or p is head}  # looked up, not read
        self.weight_bytes = sum(p.nbytes for p in used.values())
        self.head_weights = head.numel()
        self.trunk_weights = sum(p.numel() for p in used.values()) - self.head_weights

    def allocate(self, blocks: int, block_size: int) -> None:
        """Room for keys and values, a layer's when it first asks for it."""
        self.blocks, self.block_size, self.caches = blocks, block_size, {}

    def allocate_now(self) -> None:
        """The memory of all layers, before they ask for it."""
        for layer, like in self.served.caches.items():
            self.caches.setdefault(layer, self._new_cache(layer, *like))

    def release(self) -> None:
        self.caches = {}

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, the model generates; afterwards it is as it was."""
        served = self.served
        with attention.paged(self.inner), layers.replaced(self.inner, served.faster, served.options):
            self._head = layers.head(self.model) if served.faster else output_head(self.model).logits
            yield

    def run(self, work: list[Work]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute a step; returns the logits (S, V) after the last token of each that samples, in order, and with a
        value head the values there (S,)."""
        order, batch = self._batch([(w.sequence, w.count) for w in work])
        hidden = self._forward(*batch)  # (N, H)
        ends = np.cumsum([work[i].count for i in order]) - 1
        row_of = {i: int(end) for i, end in zip(order, ends, strict=True)}
        rows = torch.tensor([row_of[i] for i, w in enumerate(work) if w.samples], dtype=torch.int64, device=self.device)
        states = hidden[rows]  # (S, H)
        values = None if self.value_head is None else self.value_head(states.float()).squeeze(-1)
        return self._head(states) if len(rows) else hidden.new_empty(0, 0), values

    def copy(self, moves: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), in every layer."""
        if moves:
            source, target = torch.tensor(moves, device=self.device).T
            for cache in self.caches.values():
                cache.keys[target], cache.values[target] = cache.keys[source], cache.values[source]

    def weight_version(self) -> tuple[Any, ...]:
        """Changes when weights change in place, or an adapter is switched or folded."""
        weights = [(p.data_ptr(), p._version) for p in self.model.parameters()]
        adapters = [
            (m.disable_adapters, m.merged, tuple(m.active_adapters), tuple(m.scaling.items()))
            for m in self.inner.modules()
            if isinstance(m, LoraLayer)
        ]
        return (*weights, *adapters)

    def _batch(
        self, work: list[tuple[Sequence, int]]
    ) -> tuple[list[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch]]:
        """The order that a step computes its sequences in, and its tokens, positions, slots and places.

        Sequences of one family stand side by side, so that what they share is read once.
        """
        families: dict[object, list[int]] = {}
        for i, (sequence, _) in enumerate(work):
            families.setdefault(sequence.family or sequence, []).append(i)
        order = [i for members in families.values() for i in members]
        ids: list[int] = []
        positions: list[np.ndarray] = []
        tables = np.zeros((len(work), max(len(sequence.blocks) for sequence, _ in work)), np.int32)
        for row, i in enumerate(order):
            sequence, count = work[i]
            begin = sequence.computed
            ids += sequence.tokens(begin, begin + count)
            positions.append(np.arange(begin, begin + count))
            tables[row, : len(sequence.blocks)] = sequence.blocks
        counts = np.array([work[i][1] for i in order])
        starts = np.array([work[i][0].computed for i in order])
        rows, at = np.repeat(np.arange(len(order)), counts), np.concatenate(positions)
        slots = tables[rows, at // self.block_size].astype(np.int64) * self.block_size + at % self.block_size
        groups = np.cumsum([0, *map(len, families.values())])
        shared = [
            _leading_equal(tables[a:b], int(starts[a:b].min()) // self.block_size)
            for a, b in itertools.pairwise(groups)
        ]
        tables_there, cu_queries, contexts, of_groups, shared_there = (
            self._tensor(x, torch.int32) for x in (tables, np.cumsum([0, *counts]), starts + counts, groups, shared)
        )
        place = PagedBatch(tables_there, cu_queries, contexts, of_groups, shared_there)
        if self.device.type != "cpu":
            place = place.placed(len(ids))
        return order, (self._tensor(ids), self._tensor(at), self._tensor(slots), place)

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, batch: PagedBatch
    ) -> torch.Tensor:
        with attention.using(attention.Step(self.caches, batch, slots, self._new_cache)):
            out = self.inner.base_model(
                input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False
            )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def _new_cache(self, layer: int, kv_heads: int, dim: int, like: torch.Tensor) -> KVCache:
        return KVCache.new(self.blocks, kv_heads, dim, self.block_size, like)

    def _tensor(self, x: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        made = torch.as_tensor(np.asarray(x), dtype=dtype)
        return made if self.device.type == "cpu" else made.pin_memory().to(self.device, non_blocking=True)


def _leading_equal(tables: np.ndarray, most: int) -> int:
    """How many leading blocks, at most so many, are the same in all rows; 0 for one row, which shares with nobody."""
    if len(tables) == 1 or most == 0:
        return 0
    same = (tables[:, :most] == tables[:1, :most]).all(0)
    return most if same.all() else int(same.argmin())
