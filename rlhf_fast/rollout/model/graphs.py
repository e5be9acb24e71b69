"""Steps of decoding as CUDA graphs: one launch in place of the hundreds that a model's layers take.

A graph repeats its kernels on the memory that it was recorded with. So the tokens and places of a step are copied into
buffers first, and since sizes are part of a recording, a step is padded to one of few sizes with sequences that
nobody reads. Sampling, and what has more than one token for a sequence, is left out.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rlhf_fast.rollout.batch import Placed, StepBatch

Compute = Callable[[Placed], torch.Tensor]  # hidden states (N, H)
LEAST_BLOCKS = 4  # of a table: fewer would be sizes of their own
# Sequences: each size is at most half as large again as the one before, and of those that are added little is read.
SIZES = sorted({size << shift for size in (1, 3) for shift in range(14)})


class Size(NamedTuple):
    """Size of the steps that a recording is for."""

    sequences: int
    blocks: int
    shares: bool  # whether sequences have blocks in common


@dataclass(frozen=True)
class Recording:
    """Recorded CUDA graph of a step, with the buffers that it reads and writes."""

    inputs: list[torch.Tensor]
    graph: Any  # torch.cuda.CUDAGraph
    hidden: torch.Tensor  # (sequences, H), of the last replay


class Graphs:
    """Recordings of one model with one memory of keys and values, made as they are needed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.recordings: dict[Size, Recording] = {}
        self.refused = ""  # why a recording failed: no other is tried
        self._made_with: object = None

    def keep_only_for(self, identity: object) -> None:
        """Drop what was recorded with other memory, or with other operations."""
        if identity != self._made_with:
            self.forget()
            self._made_with = identity

    def forget(self) -> None:
        self.recordings = {}

    def run(self, step: StepBatch, compute: Compute, spare_block: int, block_size: int) -> torch.Tensor | None:
        """The hidden states (N, H) of a step of decoding, in memory that the next one overwrites; None where that
        cannot be recorded."""
        if self.refused or not step.decodes:
            return None
        n = len(step.ids)
        blocks = max(LEAST_BLOCKS, 1 << (step.tables.shape[1] - 1).bit_length())
        size = Size(SIZES[bisect_left(SIZES, n)], blocks, bool(step.shared.any()))
        padded = step.padded(size.sequences, size.blocks, spare_block, block_size)
        if size not in self.recordings:
            inputs = [x.to(self.device) for x in padded.flat(pinned=False)]
            placed = padded.cut(inputs)
            try:
                graph, hidden = record(lambda: compute(placed), [x.graph for x in self.recordings.values()])
            except (RuntimeError, ValueError, TypeError) as error:
                self.refused = str(error).strip().splitlines()[0]
                warnings.warn(
                    f"no CUDA graphs: this model's layers cannot be recorded ({self.refused}); they go on without",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return None
            self.recordings[size] = Recording(inputs, graph, hidden)
        recording = self.recordings[size]
        for buffer, x in zip(recording.inputs, padded.flat(pinned=self.device.type == "cuda"), strict=True):
            buffer.copy_(x, non_blocking=True)
        recording.graph.replay()
        return recording.hidden[:n]


def record(compute: Callable[[], torch.Tensor], others: list[Any]) -> tuple[Any, torch.Tensor]:
    """Compute once, so that kernels are compiled and libraries have their memory, and record a second time.

    All recordings work in the memory of the first: they run one at a time, and what one leaves is read before the next.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        compute()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=others[0].pool() if others else None):
        hidden = compute()
    return graph, hidden
