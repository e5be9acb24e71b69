"""Schedule what the next step computes: from one budget of tokens, whoever has tokens that are not computed yet.

There is no prefill and no decode. A sequence that is decoding has one token to compute, a new one its prompt, in
chunks if the budget ends; one that was preempted for want of memory has prompt and response to compute again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from rlhf_fast.rollout.blocks import BlockPool
from rlhf_fast.rollout.sequence import Sequence


@dataclass(frozen=True)
class Work:
    """The next `count` tokens of a sequence."""

    sequence: Sequence
    count: int
    samples: bool  # whether they are its last ones


class Scheduler:
    """Sequences that wait and that run, each in the order they came in."""

    def __init__(self, pool: BlockPool, max_batch_tokens: int, max_sequences: int, share_prefixes: bool = True) -> None:
        self.pool, self.max_batch_tokens, self.max_sequences = pool, max_batch_tokens, max_sequences
        self.share_prefixes = share_prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.reused = 0  # tokens that were not computed again
        self._leaders: dict[tuple[int, ...], Sequence] = {}  # by prompt, while it is not computed

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one whose prompt is about to be computed for another waits to share it."""
        leader = self._leaders.get(sequence.prompt)
        if leader is not None and self.share_prefixes and not sequence.response:
            sequence.family = leader.family
            leader.waiting_siblings.append(sequence)
            return
        sequence.family = object()
        if not sequence.response:
            self._leaders[sequence.prompt] = sequence
        self.waiting.append(sequence)

    def is_empty(self) -> bool:
        return not self.waiting and not self.running

    def schedule(self) -> list[Work]:
        """Choose the work of one step, at most `max_batch_tokens` tokens, and allocate its blocks."""
        budget = self.max_batch_tokens
        work: list[Work] = []
        while budget and len(work) < len(self.running):  # the last one is preempted, and has no work yet
            sequence = self.running[len(work)]
            count = min(len(sequence) - sequence.computed, budget)
            if self.pool.grow(sequence, sequence.computed + count):
                work.append(self._given(sequence, count))
                budget -= count
            else:
                self._preempt(self.running[-1])
        while self.waiting and budget and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if self.share_prefixes:
                self.pool.reuse_prefix(sequence)
            reused = sequence.computed
            count = min(len(sequence) - reused, budget)
            needed = self.pool.blocks_for(len(sequence)) - len(sequence.blocks) + self._reserved_blocks()
            enough = needed <= self.pool.free
            if not (enough or not self.running) or not self.pool.grow(sequence, sequence.computed + count):
                self.pool.release(sequence)
                break
            self.running.append(self.waiting.popleft())
            self.reused += reused
            work.append(self._given(sequence, count))
            budget -= count
        if not work and not self.is_empty():
            raise RuntimeError(f"the scheduler is stuck: {self.pool.free} of {self.pool.count} blocks are free")
        return work

    def _given(self, sequence: Sequence, count: int) -> Work:
        if self.share_prefixes:
            self.pool.register(sequence, sequence.computed + count)
        return Work(sequence, count, sequence.computed + count == len(sequence))

    def _reserved_blocks(self) -> int:
        """Count the free blocks that a new sequence must leave: one for each running sequence that will need more, or
        one of them would soon be preempted."""
        final = (len(s.prompt) + s.params.max_new_tokens for s in self.running)
        return sum(self.pool.blocks_for(n) > len(s.blocks) for n, s in zip(final, self.running, strict=True))

    def _preempt(self, sequence: Sequence) -> None:
        """Preempt a running sequence: free its blocks, and queue it to be computed again."""
        self.preemptions += 1
        self.pool.release(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def fork(self, leader: Sequence) -> list[tuple[Sequence, tuple[int, int] | None]]:
        """Run the siblings of a sequence whose prompt has just been computed, on the prompt's blocks.

        Returns those that do, each with the (from, to) of a block that must be copied first: its last, half-filled
        one. The others queue, and will find the full blocks.
        """
        self._leaders.pop(leader.prompt, None)
        siblings, leader.waiting_siblings = leader.waiting_siblings, []
        forked: list[tuple[Sequence, tuple[int, int] | None]] = []
        full, rest = divmod(leader.computed, self.pool.block_size)
        for i, sequence in enumerate(siblings):
            if sequence.is_finished:
                continue
            if self.pool.free < 1 + self._reserved_blocks() or len(self.running) >= self.max_sequences:
                self.waiting.extendleft(reversed([s for s in siblings[i:] if not s.is_finished]))
                break
            sequence.blocks = [self.pool.share(block) for block in leader.blocks[:full]]
            sequence.computed, sequence.registered, sequence.content = (
                leader.computed,
                leader.registered,
                leader.content,
            )
            self.reused += leader.computed
            copy = None
            if rest:
                sequence.blocks.append(self.pool.take())
                copy = (leader.blocks[full], sequence.blocks[full])
            self.running.append(sequence)
            forked.append((sequence, copy))
        return forked

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence, wherever it stands; its siblings go on."""
        if sequence.is_finished:
            return
        sequence.finish_reason = reason
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.pool.release(sequence)
        if self._leaders.get(sequence.prompt) is sequence:
            del self._leaders[sequence.prompt]
            siblings, sequence.waiting_siblings = sequence.waiting_siblings, []
            for sibling in siblings:
                if not sibling.is_finished:
                    self.add(sibling)
