from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.kernels import launch_sizes
from rlhf_fast.ops import compiled
from rlhf_fast.ops.paged_attention import KVCache, PagedBatch, kernels
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_no_worse_than_torch
from tests.unit.ops.conftest import INTERPRETED, Backend


class Problem(NamedTuple):
    """Sequences whose keys and values are in blocks, and whose last tokens ask."""

    query: Tensor  # (N, heads, dim)
    cache: KVCache
    batch: PagedBatch
    keys: list[Tensor]  # of each sequence, (context, kv heads, dim)
    values: list[Tensor]

    def order(self, order: Sequence[int]) -> Problem:
        """The same sequences in another order."""
        parts = self.query.split(self.batch.cu_queries.diff().tolist())
        counts = self.batch.cu_queries.diff()[list(order)]
        batch = PagedBatch.of(
            self.batch.tables[list(order)],
            torch.tensor([0, *counts.tolist()]).cumsum(0).int(),
            self.batch.contexts[list(order)],
        )
        pick = [self.keys[i] for i in order], [self.values[i] for i in order]
        return Problem(torch.cat([parts[i] for i in order]), self.cache, batch, *pick)


def problem(
    contexts: Sequence[int],
    counts: Sequence[int],
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    shared: int = 0,
    seed: int = 0,
) -> Problem:
    """All sequences begin with the same `shared` blocks. What no sequence holds is nan."""
    generator = torch.Generator().manual_seed(seed)
    needs = [-(-context // block_size) for context in contexts]
    free = iter((torch.randperm(sum(needs) + 3, generator=generator)).tolist())
    first = [next(free) for _ in range(shared)]
    tables = torch.full((len(contexts), max(needs)), 0, dtype=torch.int32)
    cache = KVCache.new(sum(needs) + 3, kv_heads, dim, block_size, torch.empty(0, dtype=dtype))
    cache.keys[:, :, :dim], cache.values[..., :dim] = math.nan, math.nan
    everywhere = torch.randn(2, shared * block_size, kv_heads, dim, generator=generator).to(dtype)
    keys, values = [], []
    for b, (context, need) in enumerate(zip(contexts, needs, strict=True)):
        tables[b, :need] = torch.tensor([*first, *(next(free) for _ in range(need - shared))], dtype=torch.int32)
        own = torch.randn(2, context, kv_heads, dim, generator=generator).to(dtype)
        own[:, : shared * block_size] = everywhere
        at = torch.arange(context)
        slots = tables[b, at // block_size].long() * block_size + at % block_size
        ops.write_kv(cache, own[0], own[1], slots)
        keys.append(own[0])
        values.append(own[1])
    cu_queries = torch.tensor([0, *counts]).cumsum(0).int()
    query = torch.randn(sum(counts), heads, dim, generator=generator).to(dtype)
    batch = PagedBatch.of(tables, cu_queries, torch.tensor(contexts, dtype=torch.int32))
    return Problem(query, cache, batch, keys, values)


def by_definition(p: Problem, options: dict[str, Any]) -> Tensor:
    """One query and one head at a time, in float64."""
    scale, softcap = options.get("scale") or p.cache.dim**-0.5, options.get("softcap", 0.0)
    window, sinks = options.get("window", 0), options.get("sinks")
    out = torch.empty(p.query.shape, dtype=torch.float64)
    heads, kv_heads = p.query.shape[1], p.cache.keys.shape[1]
    for b, context in enumerate(p.batch.contexts.tolist()):
        begin, end = p.batch.cu_queries[b : b + 2].tolist()
        for n, h in itertools.product(range(begin, end), range(heads)):
            last = context - end + n
            first = max(0, last + 1 - window) if window else 0
            seen = slice(first, last + 1)
            key, value = (x[b][seen, h * kv_heads // heads].double() for x in (p.keys, p.values))
            scores = scale * key @ p.query[n, h].double()
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[h : h + 1].double()])
            out[n, h] = torch.softmax(scores, 0)[: len(value)] @ value
    return out


SHAPES: list[dict[str, Any]] = [
    {},
    {"heads": 9, "kv_heads": 3, "dim": 64, "block_size": 32},
    {"heads": 6, "kv_heads": 1, "dim": 80},
    {"heads": 3, "kv_heads": 3, "dim": 8, "block_size": 48},
    {"heads": 2, "kv_heads": 1, "dim": 256, "block_size": 128},
    {"heads": 5, "kv_heads": 5, "dim": 20},
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 5},
    {"window": 17, "softcap": 3.0},
    {"scale": 0.1, "sinks": torch.linspace(-1.0, 3.0, 9)},
]


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "defaults")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())) or "defaults")
@pytest.mark.seconds(4)
def test_values_are_no_worse_than_torch(
    kernel_backend: Backend, shape: dict[str, Any], options: dict[str, Any], dtype: torch.dtype
) -> None:
    if kernel_backend.slow and shape.get("dim", 16) > 16 and (dtype != torch.float32 or options):
        pytest.skip("an element takes a while there, and all the rest is tried in smaller shapes")
    size = shape.get("block_size", 16)
    contexts = [1, size - 1, size, size + 1, 2 * size + 3, 3 * size]
    many = min(size, 17) if kernel_backend.slow else size  # an interpreter's time is that of its queries
    p = problem(contexts, [1, 1, many, 3, 1, 2 * many + 1], **shape, dtype=dtype)
    options = {**options, "sinks": options["sinks"][: p.query.shape[1]]} if "sinks" in options else options
    got = kernel_backend(ops.paged_attention, p.query, p.cache, p.batch, **options)
    assert got.dtype == dtype
    stock = Backend("reference")(ops.paged_attention, p.query, p.cache, p.batch, **options)
    assert_no_worse_than_torch(got, stock, by_definition(p, options).to(torch.float64))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "defaults")
@pytest.mark.seconds(2)
def test_a_sequence_has_the_same_bits_in_any_batch_and_in_any_chunks(
    kernel_backend: Backend, options: dict[str, Any]
) -> None:
    options = {**options, "sinks": options["sinks"][:4]} if "sinks" in options else options
    lengths = [5, 20, 17, 36] if kernel_backend.slow else [5, 40, 33, 70]
    p = problem(lengths, lengths)

    def run(p: Problem) -> list[Tensor]:
        out = kernel_backend(ops.paged_attention, p.query, p.cache, p.batch, **options)
        return list(out.split(p.batch.cu_queries.diff().tolist()))

    whole = run(p)
    order = [2, 0, 3, 1]
    for got, i in zip(run(p.order(order)), order, strict=True):
        assert torch.equal(got, whole[i])
    for i in range(4):
        assert torch.equal(run(p.order([i]))[0], whole[i])
    # Token by token, as decoding asks, and in chunks of 7.
    for step in (7,) if kernel_backend.slow else (1, 7):
        for i in (1, 3) if kernel_backend.slow else range(4):
            for begin in range(0, len(whole[i]), step):
                end = min(begin + step, len(whole[i]))
                place = PagedBatch.of(
                    p.batch.tables[[i]], torch.tensor([0, end - begin]).int(), torch.tensor([end]).int()
                )
                start = int(p.batch.cu_queries[i])
                query = p.query[start + begin : start + end]
                got = kernel_backend(ops.paged_attention, query, p.cache, place, **options)
                assert torch.equal(got, whole[i][begin:end])


@pytest.mark.parametrize("counts", [[1] * 7, [1, 5, 2, 1, 9, 1, 3]])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "defaults")
def test_reading_shared_blocks_once_changes_no_bit(
    kernel_backend: Backend, options: dict[str, Any], counts: list[int]
) -> None:
    options = {**options, "sinks": options["sinks"][:4]} if "sinks" in options else options
    p = problem([50, 60, 49, 75, 90, 48 + 1, 64], counts, shared=3, seed=4)
    alone = kernel_backend(ops.paged_attention, p.query, p.cache, p.batch, **options)
    for groups, shared in (([0, 7], [2]), ([0, 3, 7], [2, 1]), ([0, 1, 5, 7], [0, 2, 2])):
        batch = p.batch._replace(
            groups=torch.tensor(groups, dtype=torch.int32), shared=torch.tensor(shared, dtype=torch.int32)
        )
        assert torch.equal(kernel_backend(ops.paged_attention, p.query, p.cache, batch, **options), alone)


def test_a_batch_with_its_places_gives_the_same_bits_and_finds_no_place_again(kernel_backend: Backend) -> None:
    """So that positions are found once for all layers of a step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.operations: set[str] = set()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operations.add(str(function))
            return function(*args, **(kwargs or {}))

    p = problem([50, 60, 49, 75], [1, 3, 1, 2], shared=2)
    groups = p.batch._replace(groups=torch.tensor([0, 3, 4]).int(), shared=torch.tensor([2, 0]).int())
    for batch in (p.batch, groups):
        placed = batch.placed(7)
        assert placed.places is not None and placed[:5] == batch[:5]
        assert placed.places.positions.tolist() == [49, 57, 58, 59, 48, 73, 74]
        want = kernel_backend(ops.paged_attention, p.query, p.cache, batch)
        assert torch.equal(kernel_backend(ops.paged_attention, p.query, p.cache, placed), want)
    cache, query = kernel_backend._to(p.cache), kernel_backend._to(p.query)
    placed, out = kernel_backend._to(placed), torch.empty_like(query)
    with Record() as finding:
        groups.placed(7)
    with Record() as record:
        kernels(kernel_backend.name).forward(query, cache, placed, 0.25, 0.0, 0, None, out)
    assert torch.equal(out.cpu(), want)
    assert len(finding.operations) > 5 and not finding.operations & record.operations


def test_long_contexts_in_parts_of_their_own_change_no_bit_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton, parts of the keys go to programs of their own where there are few queries."""
    backend = Backend("triton")
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    from rlhf_fast.kernels import paged_attention as kernels

    p = problem([60, 100, 40, 130, 33], [2, 1, 1, 3, 1], dim=8, shared=2)
    groups = p.batch._replace(groups=torch.tensor([0, 3, 5]).int(), shared=torch.tensor([2, 2]).int())
    long = problem([70, 120, 81], [1, 2, 1], dim=8, shared=4)
    of_one = long.batch._replace(groups=torch.tensor([0, 3]).int(), shared=torch.tensor([4]).int())
    for one, batch in ((p, p.batch), (p, groups), (long, long.batch), (long, of_one)):
        for options in ({}, {"window": 45}):
            found = []
            for most in (0, 1 << 30):
                monkeypatch.setattr(kernels, "MOST_SPLIT", most)
                with launch_sizes.trying("paged_attention", backend.device, {"PART": 32}):
                    found.append(backend(ops.paged_attention, one.query, one.cache, batch, **options))
            assert torch.equal(*found)
            torch.testing.assert_close(found[0].double(), by_definition(one, options), rtol=1e-5, atol=1e-5)


@pytest.mark.seconds(4)
def test_long_contexts_in_parts_of_their_own_change_no_bit_in_cuda(
    kernel_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel_backend.name != "cuda":
        pytest.skip("of the CUDA kernels")
    for heads, kv_heads in ((4, 2), (10, 1)):
        p = problem([300, 257, 600, 40], [2, 1, 3, 1], heads, kv_heads, dim=8)
        for options in ({}, {"window": 270, "softcap": 3.0}):
            found = []
            for most in (0, 1 << 30):
                monkeypatch.setattr(compiled, "_MOST_PARTS", most)
                found.append(kernel_backend(ops.paged_attention, p.query, p.cache, p.batch, **options))
            assert torch.equal(*found)
            torch.testing.assert_close(found[0].double(), by_definition(p, options), rtol=1e-5, atol=1e-5)


@pytest.mark.seconds(2)
def test_layout_and_threads_change_no_bit(kernel_backend: Backend) -> None:
    p = problem([50, 60, 49], [50, 3, 1])
    want = kernel_backend(ops.paged_attention, p.query, p.cache, p.batch)
    turned = p.query.transpose(0, 1).contiguous().transpose(0, 1)  # heads first in memory
    spread = torch.stack([p.query, p.query], dim=-1)[..., 0]
    before = torch.get_num_threads()
    try:
        for query in (turned, spread):
            for threads in (1,) if kernel_backend.slow else (1, 2, 5):
                torch.set_num_threads(threads)
                assert torch.equal(kernel_backend(ops.paged_attention, query, p.cache, p.batch), want)
    finally:
        torch.set_num_threads(before)


@cases.property_test
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 20)), min_size=1, max_size=5), st.sampled_from([0, 1, 3, 40])
)
def test_any_batch_is_what_the_definition_says(sequences: list[tuple[int, int]], window: int) -> None:
    contexts = [max(pair) for pair in sequences]
    p = problem(contexts, [min(pair) for pair in sequences], dim=8)
    got = ops.paged_attention(p.query, p.cache, p.batch, window=window)
    torch.testing.assert_close(got.double(), by_definition(p, {"window": window}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
@pytest.mark.parametrize(("dim", "block_size"), [(64, 32), (80, 16), (10, 16)])
def test_writing_with_rotation_is_rotating_and_writing(
    kernel_backend: Backend, dim: int, block_size: int, dtype: torch.dtype
) -> None:
    tokens, kv_heads = 23, 2
    key, value, query = (cases.random(tokens, n, dim, seed=n, dtype=dtype) for n in (2, 3, 6))
    value = value[:, :kv_heads]  # not contiguous
    angle = cases.random(tokens, dim // 2, seed=9)
    cos, sin = (torch.cat([f(angle)] * 2, dim=-1).to(dtype) for f in (torch.cos, torch.sin))
    slots = torch.randperm(5 * block_size, generator=torch.Generator().manual_seed(0))[:tokens]
    found = []
    for backend in (kernel_backend, Backend("reference")):
        cache, mine = KVCache.new(5, kv_heads, dim, block_size, key), query.clone()
        backend(ops.write_kv, cache, key, value, slots, cos, sin, mine)
        found.append((cache.keys, cache.values, mine))
    assert torch.equal(found[0][1], found[1][1])
    exact = [x.double() for x in found[1]]
    for got, want in zip(found[0], exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    plain = KVCache.new(5, kv_heads, dim, block_size, key)
    kernel_backend(ops.write_kv, plain, key, value, slots)
    block, at = slots // block_size, slots % block_size
    assert torch.equal(plain.keys[block, :, :dim, at], key) and torch.equal(plain.values[block, :, at, :dim], value)
    assert int((plain.keys != 0).sum()) == key.numel()


@pytest.mark.parametrize("context", [1, 20])
def test_one_token_alone_is_attended(kernel_backend: Backend, context: int) -> None:
    p = problem([context], [1])
    got = kernel_backend(ops.paged_attention, p.query, p.cache, p.batch).double()
    torch.testing.assert_close(got, by_definition(p, {}), rtol=1e-5, atol=1e-5)


def test_bad_arguments_are_named() -> None:
    p = problem([5], [2])
    with pytest.raises(ValueError, match=r"query: shape \(2, 3, 16\), expected \(N, a multiple of 2, 16\)"):
        ops.paged_attention(p.query[:, :3], p.cache, p.batch)
    with pytest.raises(ValueError, match=r"key: shape \(2, 4, 16\), expected \(2, 2, 16\) like the cache"):
        ops.write_kv(p.cache, p.query, p.query, torch.tensor([0, 1]))
    key, slots = p.query[:, :2], torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"key: torch.float64, expected torch.float32"):
        ops.write_kv(p.cache, key.double(), key.double(), slots)
    with pytest.raises(ValueError, match=r"slots: from 0 to 64, expected from 0 to 63"):
        ops.write_kv(p.cache, key, key, torch.tensor([0, 64]))
    right = {"value": key, "cos": key[:, 0], "sin": key[:, 0], "query": key}
    for name, x in right.items():
        with pytest.raises(TypeError, match=f"{name}: torch.float16, expected torch.float32 like the cache"):
            ops.write_kv(p.cache, key, slots=slots, **{**right, name: x.half()})
    with pytest.raises(ValueError, match="cos, sin: expected both or neither"):
        ops.write_kv(p.cache, key, key, slots, cos=key[:, 0])
    with pytest.raises(TypeError, match=r"query: torch.float64, expected torch.float32 like the cache"):
        ops.paged_attention(p.query.double(), p.cache, p.batch)
    changes: list[tuple[dict[str, Tensor], type[Exception], str]] = [
        ({"tables": p.batch.tables.long()}, TypeError, "batch.tables: torch.int64 .* expected int32"),
        ({"tables": p.batch.tables + 99}, ValueError, "batch.tables: from .* expected from 0 to 3"),
        ({"contexts": p.batch.contexts + 99}, ValueError, "batch.contexts: up to 104, .* at most the 16 positions"),
        ({"contexts": p.batch.contexts - 4}, ValueError, "batch.contexts: up to 1, expected at least each one's"),
        ({"cu_queries": p.batch.cu_queries + 1}, ValueError, "batch.cu_queries: expected to rise from 0 to the 2"),
    ]
    for change, error, message in changes:
        with pytest.raises(error, match=message):
            ops.paged_attention(p.query, p.cache, p.batch._replace(**change))


def test_heads_too_wide_for_the_kernels_are_for_the_reference() -> None:
    p = problem([20, 5], [3, 1], dim=272)
    got = ops.paged_attention(p.query, p.cache, p.batch)
    torch.testing.assert_close(got.double(), by_definition(p, {}), rtol=1e-5, atol=1e-5)
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="paged_attention: has no 'cpu' backend"):
        ops.paged_attention(p.query, p.cache, p.batch)


def test_what_does_not_fit_is_named() -> None:
    cache = KVCache.new(2, 1, 8, 16, torch.empty(0))
    batch = PagedBatch.of(
        torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    )
    query = torch.zeros(1, 2, 8)
    for change, words in (
        ({"query": query[0]}, r"query: shape \(2, 8\), expected \(N, heads, 8\)"),
        ({"query": query.bfloat16()}, "query: torch.bfloat16, expected torch.float32 like the cache"),
        ({"sinks": torch.zeros(3)}, r"sinks: shape \(3,\), expected \(2,\) like the heads of query"),
        ({"sinks": torch.zeros(2, dtype=torch.int64)}, "sinks: int64, expected float32"),
        ({"batch": batch._replace(contexts=batch.contexts.long())}, "batch.contexts: torch.int64"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            ops.paged_attention(**{"query": query, "cache": cache, "batch": batch, **change})
    narrow = torch.zeros(2, dtype=torch.bfloat16)  # brought to float32
    assert bool(ops.paged_attention(query, cache, batch, sinks=narrow).isfinite().all())
