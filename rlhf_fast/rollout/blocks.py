"""Allocate blocks of keys and values to sequences, and find those that hold a prefix that was computed before."""

from __future__ import annotations

from collections import OrderedDict

from rlhf_fast.rollout.sequence import Sequence

Key = tuple[int, tuple[int, ...]]  # what comes before a block (a content number), and its tokens


class BlockPool:
    """Pool of blocks with reference counts; a full block that nobody uses keeps its content until it is reallocated.

    A prefix is found by the tokens themselves: block by block, (number of the prefix before, tokens) leads to the
    block and the number of the longer prefix. Numbers are never given twice, so that a stale prefix cannot be met.
    """

    def __init__(self, count: int, block_size: int) -> None:
        self.count, self.block_size = count, block_size
        self._users = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # next to be taken first
        self._blocks: dict[Key, int] = {}
        self._keys: list[Key | None] = [None] * count
        self._contents: list[int] = [0] * count
        self._next_content = 1

    @property
    def free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def take(self) -> int:
        """Allocate a block to one user."""
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._users[block] = 1
        return block

    def share(self, block: int) -> int:
        """Add one more user of a block."""
        if self._users[block] == 0:
            del self._free[block]
        self._users[block] += 1
        return block

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a sequence blocks for its first `tokens` tokens, if there are enough."""
        missing = self.blocks_for(tokens) - len(sequence.blocks)
        if missing > self.free:
            return False
        sequence.blocks += [self.take() for _ in range(missing)]
        return True

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's blocks back; the last ones are the first to be given away."""
        for block in reversed(sequence.blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)
        sequence.blocks, sequence.computed, sequence.registered, sequence.content = [], 0, 0, 0

    def reuse_prefix(self, sequence: Sequence) -> None:
        """Give a sequence that has no blocks those that hold its first tokens, all but the last one at most."""
        size, content = self.block_size, 0
        while (sequence.registered + 1) * size < len(sequence):
            begin = sequence.registered * size
            block = self._blocks.get((content, tuple(sequence.tokens(begin, begin + size))))
            if block is None:
                break
            sequence.blocks.append(self.share(block))
            content = self._contents[block]
            sequence.registered += 1
        sequence.content, sequence.computed = content, sequence.registered * size

    def register(self, sequence: Sequence, computed: int) -> None:
        """Make the full blocks of a sequence's first `computed` tokens known as prefixes.

        That may be as soon as they are about to be computed: in every layer, all keys and values of a step are
        written before any is read, so that others may share them in the same step.
        """
        size = self.block_size
        while (sequence.registered + 1) * size <= computed:
            begin = sequence.registered * size
            key = (sequence.content, tuple(sequence.tokens(begin, begin + size)))
            block = sequence.blocks[sequence.registered]
            known = self._blocks.get(key)
            if known is None:
                self._blocks[key], self._keys[block], self._contents[block] = block, key, self._next_content
                self._next_content += 1
                known = block
            sequence.content = self._contents[known]
            sequence.registered += 1

    def forget_prefixes(self) -> None:
        """Forget all prefixes, since the weights have changed."""
        for block in range(self.count):
            self._forget(block)

    def _forget(self, block: int) -> None:
        key, self._keys[block] = self._keys[block], None
        if key is not None:
            del self._blocks[key]
