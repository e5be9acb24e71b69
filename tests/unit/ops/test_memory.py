"""Large results lie in blocks of memory that are used again: csrc/common/memory.h."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.ops import compiled

pytestmark = pytest.mark.skipif(compiled._Memory is None, reason="needs the compiled module, on Linux")

MIB = 1 << 20


def large(mebibytes: int) -> torch.Tensor:
    return compiled.new_like(torch.empty(mebibytes, MIB, dtype=torch.uint8))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_is_a_plain_tensor_of_that_shape() -> None:
    x = torch.empty(1024, 3, 1024).transpose(0, 2)
    new = compiled.new_like(x)
    assert new.shape == x.shape and new.dtype == x.dtype and new.is_contiguous()
    assert new._base is None and new.storage_offset() == 0 and new.data_ptr() % (2 * MIB) == 0
    new.fill_(2.0)
    assert float(new.sum()) == 2.0 * x.numel()


def test_freed_memory_is_used_again_and_memory_in_use_is_not() -> None:
    compiled.release_memory()
    first = large(8)
    address = first.data_ptr()
    second = large(8)
    assert second.data_ptr() != address
    alias = first.view(-1)[5:]
    del first
    assert large(8).data_ptr() != address, "a view still holds it"
    del alias
    assert {large(8).data_ptr() for _ in range(3)} == {large(7).data_ptr()}


def test_a_block_twice_too_large_waits_for_a_result_of_its_size() -> None:
    compiled.release_memory()
    block = large(64)
    address = block.data_ptr()
    del block
    small = large(8)
    assert not address <= small.data_ptr() < address + 64 * MIB
    assert large(60).data_ptr() == address


def test_keeps_few_blocks_and_releases_them() -> None:
    compiled.release_memory()
    before = resident()
    blocks = [large(32).fill_(1) for _ in range(8)]
    assert resident() - before > 200 * MIB
    del blocks
    assert resident() - before < 160 * MIB, "four blocks are kept"
    compiled.release_memory()
    assert resident() - before < 32 * MIB


def test_what_asks_for_too_much_is_told() -> None:
    with pytest.raises(MemoryError):
        compiled._Memory(1 << 60)


def test_a_gradient_in_it_lives_as_long_as_it_is_held() -> None:
    logits = torch.randn(64, 32768, requires_grad=True)
    tokens = torch.zeros(64, dtype=torch.int64)
    ops.token_logprobs(logits, tokens)[0].sum().backward()
    assert logits.grad is not None
    kept, gone = logits.grad.clone(), weakref.ref(logits.grad)
    ops.token_logprobs(logits, tokens)[1].sum().backward()  # adds to it, and frees its own
    ops.token_logprobs(logits, tokens)[0].sum().backward()
    assert not torch.equal(logits.grad, kept)
    logits.grad = None
    gc.collect()
    assert gone() is None
    (again,) = torch.autograd.grad(ops.token_logprobs(logits, tokens)[0].sum(), logits)
    assert torch.equal(again, kept)
