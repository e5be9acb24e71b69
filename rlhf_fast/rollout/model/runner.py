"""Run a model over a step's packed tokens: their places in the cache, positions, and the logits to sample from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rlhf_fast.models.adapters import Model, uses_of_adapters
from rlhf_fast.models.fingerprint import fingerprint
from rlhf_fast.models.forward import output_head, unwrapped
from rlhf_fast.models.inner import trunk
from rlhf_fast.ops.paged_attention import KVCache
from rlhf_fast.rollout.batch import Placed, step_batch
from rlhf_fast.rollout.model import attention, layers
from rlhf_fast.rollout.model.graphs import Graphs
from rlhf_fast.rollout.model.probe import probe
from rlhf_fast.rollout.scheduler import Work


class ModelRunner:
    """A model, and the keys and values of all its layers."""

    def __init__(
        self, model: Model, fast: bool = True, value_head: nn.Module | None = None, graphs: bool = False
    ) -> None:
        self.model, self.inner, self.value_head = model, unwrapped(model), value_head
        self.device = self.inner.get_input_embeddings().weight.device
        self.served = probe(self.inner, self.device, fast)
        self.graphs = Graphs(self.device) if graphs else None
        self.caches: dict[int, KVCache] = {}
        self.blocks = self.block_size = 0
        head, embedding = output_head(model).weight, self.inner.get_input_embeddings().weight
        used = {id(p): p for p in self.inner.parameters() if p is not embedding or p is head}  # looked up, not read
        self.weight_bytes = sum(p.nbytes for p in used.values())
        self.head_weights = head.numel()
        self.trunk_weights = sum(p.numel() for p in used.values()) - self.head_weights

    def allocate(self, blocks: int, block_size: int) -> None:
        """Allocate the cache of keys and values, each layer's on its first use."""
        self.release()
        self.blocks, self.block_size = blocks, block_size

    def allocate_now(self) -> None:
        """Allocate the cache of all layers now."""
        for layer, like in self.served.caches.items():
            self.caches.setdefault(layer, self._new_cache(layer, *like))

    def release(self) -> None:
        self.caches = {}
        if self.graphs is not None:
            self.graphs.forget()

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Set the model up to generate, for a block; afterwards it is as it was."""
        served = self.served
        if self.graphs is not None:
            self.allocate_now()  # else the memory would be a recording's own
            self.graphs.keep_only_for(self._operations())
        with torch.no_grad():  # before layers are replaced, the output layer among them
            self._head = layers.head(self.model) if served.faster else output_head(self.model).logits
        with attention.paged(self.inner), layers.replaced(self.inner, served.faster, served.options):
            yield

    def run(self, work: list[Work]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute a step; returns the logits (S, V) after the last token of each that samples, in order, and with a
        value head the values there (S,)."""
        order, step = step_batch([(w.sequence, w.count) for w in work], self.block_size)
        hidden = None
        if self.graphs is not None:
            hidden = self.graphs.run(step, self._forward, self.blocks, self.block_size)
        if hidden is None:
            hidden = self._forward(step.to(self.device))  # (N, H)
        ends = step.cu_queries[1:] - 1
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
        """Changes when weights do, by whatever hand, or an adapter is switched, scaled or folded."""
        return (*fingerprint(self.model), *self._operations())

    def _operations(self) -> tuple[Any, ...]:
        """Describe where weights are, and which adapters are used: what does not change when they are trained."""
        return (*(p.data_ptr() for p in self.model.parameters()), *uses_of_adapters(self.inner))

    def _forward(self, step: Placed) -> torch.Tensor:
        with attention.using(attention.Step(self.caches, step.batch, step.slots, self._new_cache, self.served.windows)):
            out = trunk(self.inner)(
                input_ids=step.ids.unsqueeze(0), position_ids=step.positions.unsqueeze(0), use_cache=False
            )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def _new_cache(self, layer: int, kv_heads: int, dim: int, like: torch.Tensor) -> KVCache:
        spare = self.graphs is not None  # a block for the sequences that fill a recorded step up
        return KVCache.new(self.blocks + spare, kv_heads, dim, self.block_size, like)
