"""Decide how much memory keys and values get."""

from __future__ import annotations

import os
import re
from collections import abc
from pathlib import Path

import torch

from rlhf_fast.rollout.blocks import BlockPool
from rlhf_fast.rollout.model.runner import ModelRunner
from rlhf_fast.rollout.sequence import Sequence


class Budget:
    """Allocator of the pool of blocks: as large as requests need, within a limit, and kept for the next ones."""

    def __init__(self, runner: ModelRunner, block_size: int, limit: int | None) -> None:
        self.runner, self.block_size, self.limit = runner, block_size, limit
        self.bytes_per_block = runner.served.bytes_per_token * block_size
        if limit is not None and limit < self.bytes_per_block:
            raise ValueError(f"kv_bytes: {limit:,}; expected at least one block, {self.bytes_per_block:,}")
        self._pool: BlockPool | None = None
        self._blocks = 0  # that a pool was made of, also after it was released

    def pool_for(self, sequences: abc.Sequence[Sequence], at_once: int) -> BlockPool:
        """A pool in which the longest sequence fits, and if possible all that may run at once.

        Raises:
            ValueError: the longest one does not fit; says how much is needed.
        """
        size = self.block_size
        needs = sorted((-(-(len(s.prompt) + s.params.max_new_tokens) // size) for s in sequences), reverse=True)
        wanted, longest = sum(needs[:at_once]), needs[0] if needs else 0
        if self._pool is not None and self._pool.count >= wanted:
            return self._pool
        most = self._most_blocks()
        if longest > most:
            raise ValueError(
                f"kv_bytes: the longest sequence (prompt and max_new_tokens) needs {longest * self.bytes_per_block:,} "
                f"bytes of keys and values, and there are {most * self.bytes_per_block:,}; raise kv_bytes, or shorten "
                "the prompt or max_new_tokens"
            )
        blocks = min(wanted, most)
        if self._pool is None or blocks > self._pool.count:
            self.runner.release()
            self._make(blocks)
        assert self._pool is not None
        return self._pool

    def release(self) -> None:
        self.runner.release()
        self._pool = None

    def restore(self) -> None:
        if self._pool is None and self._blocks:
            self._make(self._blocks)
            self.runner.allocate_now()

    def _make(self, blocks: int) -> None:
        self.runner.allocate(blocks, self.block_size)
        self._pool, self._blocks = BlockPool(blocks, self.block_size), blocks

    def _most_blocks(self) -> int:
        if self.limit is not None:
            return self.limit // self.bytes_per_block
        ours = 0 if self._pool is None else self._pool.count * self.bytes_per_block
        return int((free_memory(self.runner.device) + ours) * 0.5) // self.bytes_per_block


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; on a CPU those to be had without swapping, cached files included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    if match is not None:
        return 1024 * int(match[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # not Linux: half of all there is


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""
