"""Every compiled entry of the CPU with arguments that fit it, as rlhf_fast/ops/compiled.py hands them over: what the
fuzz of tests/unit/ops/test_fuzz.py begins from."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import compiled
from rlhf_fast.ops._rows import matrix

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
RUN = (2, 0, 0)
Arguments = list[Any]


class Maker:
    """Tensors and numbers from one source of randomness."""

    def __init__(self, seed: int) -> None:
        self.rng, self.dtype = random.Random(seed), torch.float32
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.rng.choice(FLOATS)

    def size(self, most: int = 6, least: int = 0) -> int:
        return self.rng.randint(least, most)

    def columns(self) -> int:
        return self.rng.choice((1, 2, 7, 16, 17, 33, 64, 4096, 4097)) if self.rng.random() < 0.3 else self.size(40, 1)

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = 4 * torch.randn(shape, generator=self.generator)
        special = self.rng.random()
        if special < 0.2 and x.numel():
            x.view(-1)[self.rng.randrange(x.numel())] = self.rng.choice(
                (float("nan"), float("inf"), -float("inf"), 1e30)
            )
        return x.to(dtype or self.dtype)

    def single(self, *shape: int) -> Tensor:
        return self.floats(*shape, dtype=torch.float32)

    def whole(self, end: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, max(end, 1), shape, generator=self.generator).to(dtype)

    def mask(self, *shape: int) -> Tensor | None:
        return torch.rand(shape, generator=self.generator) < 0.7 if self.rng.random() < 0.6 else None

    def maybe(self, x: Tensor) -> Tensor | None:
        return x if self.rng.random() < 0.6 else None

    def starts(self, tokens: int, sequences: int, dtype: torch.dtype = torch.int32) -> Tensor:
        cuts = sorted(self.rng.randint(0, tokens) for _ in range(sequences - 1)) if sequences else []
        return torch.tensor([0, *cuts, tokens] if sequences else [0], dtype=dtype)

    def logits(self, rows: int, columns: int) -> Any:
        layout = self.rng.randrange(4)
        if layout == 1:  # column by column
            return tuple(matrix(self.floats(columns, rows).mT))
        if layout == 2:  # rows in two levels
            return tuple(matrix(self.floats(1, rows + 1, columns)[:, :-1]))
        if layout == 3:  # past an allocation's start
            return tuple(matrix(self.floats(rows * columns + 1)[1:].view(rows, columns)))
        return tuple(matrix(self.floats(rows, columns)))

    def transform(self, rows: int) -> tuple[float, float, float, Tensor | None]:
        softcap, temperatures = self.rng.choice((0.0, 5.0)), torch.rand(rows, generator=self.generator) + 0.1
        return self.rng.choice((1.0, 0.5)), softcap, self.rng.choice((1.0, 0.7)), self.maybe(temperatures)


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def token_logprobs_forward(m: Maker) -> Arguments:
    rows, columns = m.size(), m.columns()
    tokens = m.whole(columns, rows, dtype=m.rng.choice((torch.int32, torch.int64)))
    kept = (None, None) if m.rng.random() < 0.5 else (new(rows), new(rows))
    out = (new(rows), new(rows), *kept)
    return [m.logits(rows, columns), m.transform(rows), tokens, m.mask(rows), None, 0, out, RUN]


def token_logprobs_update(m: Maker) -> Arguments:
    rows, columns = m.size(), m.columns()
    states, first = new(rows, 1, 4, dtype=torch.float64), 4096 * m.size(2)
    tokens = m.whole(columns + 4096, rows)
    return [m.logits(rows, columns), m.transform(rows), tokens, m.mask(rows), first, states, 1, RUN]


def token_logprobs_finish(m: Maker) -> Arguments:
    rows = m.size()
    states = m.floats(rows, 1, 4, dtype=torch.float64)
    return [states, 1, rows, m.mask(rows), (new(rows), new(rows), new(rows), new(rows)), RUN]


def token_logprobs_gradient(m: Maker) -> Arguments:
    rows, columns = m.size(), m.columns()
    results = tuple(m.single(rows).abs() + 0.1 for _ in range(4))
    grads = tuple(m.maybe(m.single(rows)) for _ in range(4))
    x, first, tokens = m.logits(rows, columns), m.size(3), m.whole(columns + 3, rows)
    return [x, m.transform(rows), tokens, m.mask(rows), first, results, grads, new(rows, columns, dtype=m.dtype), RUN]


def full_kl_forward(m: Maker) -> Arguments:
    rows, columns = m.size(), m.columns()
    p, q, t = m.logits(rows, columns), m.logits(rows, columns), m.transform(rows)
    return [p, q, t, m.mask(rows), m.size(1), None, tuple(new(rows) for _ in range(9)), RUN]


def full_kl_gradient(m: Maker) -> Arguments:
    rows, columns = m.size(), m.columns()
    p, q, t = m.logits(rows, columns), m.logits(rows, columns), m.transform(rows)
    results = tuple(m.single(rows).abs() + 0.1 for _ in range(9))
    out = [m.maybe(new(rows, columns, dtype=m.dtype)) for _ in range(2)]
    return [p, q, t, m.mask(rows), m.size(1), results, m.single(rows), *out, RUN]


def kl_estimate_forward(m: Maker) -> Arguments:
    n = m.size(40)
    return [m.floats(n), m.floats(n), m.mask(n), m.size(2), new(n), RUN]


def kl_estimate_gradient(m: Maker) -> Arguments:
    n = m.size(40)
    out = [m.maybe(new(n, dtype=m.dtype)) for _ in range(2)]
    return [m.floats(n), m.floats(n), m.mask(n), m.size(2), m.single(n), *out, RUN]


def sequences(m: Maker) -> tuple[tuple[Tensor | None, int, int], int, int]:
    """(as entries take them), their number, tokens."""
    count, length = m.size(4), m.size(40)
    if m.rng.random() < 0.5:
        return (None, count, length), count, count * length
    tokens = length if count else 0
    return (m.starts(tokens, count, m.rng.choice((torch.int32, torch.int64))), count, tokens), count, tokens


def gae_forward(m: Maker) -> Arguments:
    where, count, n = sequences(m)
    both = m.rng.random() < 0.5
    policy = (m.floats(n), m.floats(n)) if both else (None, None)
    paid = (m.maybe(m.floats(n)), *policy, m.maybe(m.single(count)))
    sums = m.maybe(new(count, 3, dtype=torch.float64))
    numbers = (0.99, 0.95, m.rng.choice((0.95, 1.0)))
    out = (new(n), new(n), sums)
    return [where, paid, 0.1, m.floats(n), m.mask(n), m.maybe(m.single(count)), numbers, out, RUN]


def ppo_loss_forward(m: Maker) -> Arguments:
    n = m.rng.choice((m.size(40), 1024, 1025))
    values = m.rng.random() < 0.6
    of_values = [m.floats(n) if values else None for _ in range(3)]
    tensors = [m.floats(n), m.floats(n), m.floats(n), *of_values, *(m.maybe(m.floats(n)) for _ in range(3))]
    others = (m.mask(n), m.maybe(m.single(n)), m.maybe(m.single(n)), m.maybe(m.floats(3, dtype=torch.float64)))
    clips, objective = (m.rng.choice((0.0, 3.0)), m.rng.choice((-1.0, 0.2))), m.rng.choice((0, 1, 2))
    options = (0.2, 0.3, *clips, 0.1, 0.1, 0.1, 2.0, m.rng.choice((1.0, 300.0)), 1.05, objective, 2, 1)
    gradients = [m.maybe(new(n)) for _ in range(3)]
    partials = new(-(-n // compiled.cpu.ppo_loss_range), compiled.cpu.ppo_loss_sums, dtype=torch.float64)
    out = (new(1), new(17), new(1), *gradients, partials)
    return [tensors, others, options, (m.maybe(new(1)), 3.0), (None, 0.0), out, RUN]


def ppo_loss_scale(m: Maker) -> Arguments:
    n = m.size(40)
    given = [m.rng.random() < 0.6 for _ in range(3)]
    source = [m.single(n) if there else None for there in given]
    return [source, [new(n) if there else None for there in given], m.single(1), m.single(1), RUN]


def pair_loss_forward(m: Maker) -> Arguments:
    n = m.size(20)
    tensors = (m.floats(n), m.floats(n), m.maybe(m.floats(n)), m.maybe(m.floats(n)))
    others = (m.maybe(m.single(n)), m.maybe(m.single(n)), m.maybe(m.single(1)))
    out = (new(6), m.maybe(new(n)), m.maybe(new(n)))
    return [tensors, others, (m.size(3), 0.1, 0.9, 0.1, 0.01), (m.maybe(new(1)), 0.0), out, RUN]


def linear_forward(m: Maker) -> Arguments:
    rows, k, gate = m.size(8), m.size(40), m.rng.choice((0, 0, 1, 2))
    columns = [m.size(9, 1)] * 2 if gate else [m.size(9) for _ in range(m.size(3, 1))]
    parts, rank = [], m.size(4)
    for n in columns:
        adapter = [m.floats(rows, rank), m.floats(n, rank)] if m.rng.random() < 0.4 else [None, None]
        parts.append((m.floats(n, k + 1)[:, :k], k + 1, n, m.maybe(m.floats(n)), *adapter, rank, 0.5))
    results = columns[:1] if gate else columns
    outs = [(new(rows, n, dtype=m.dtype), n) for n in results]
    added = (m.floats(rows, columns[0]), columns[0]) if len(outs) == 1 and m.rng.random() < 0.5 else (None, 0)
    return [(m.floats(rows, k), k), rows, k, parts, outs, added, gate, RUN]


def cache(m: Maker, blocks: int, kv_heads: int, dim: int, block_size: int) -> tuple[Any, ...]:
    width = -(-dim // 16) * 16
    keys, values = m.floats(blocks, kv_heads, width, block_size), m.floats(blocks, kv_heads, block_size, width)
    return keys, values, dim, kv_heads, width, block_size


def paged_attention_forward(m: Maker) -> Arguments:
    kv_heads, dim, block_size, blocks = m.size(2, 1), m.size(33, 1), m.rng.choice((16, 32)), m.size(5, 1)
    heads, counts, most = kv_heads * m.size(3, 1), [m.size(5) for _ in range(m.size(4))], 2
    contexts = [n + m.size(most * block_size - n) for n in counts]
    tables = m.whole(blocks, len(counts), most, dtype=torch.int32)
    cu = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    groups = torch.arange(len(counts) + 1, dtype=torch.int32)
    shared = torch.tensor(
        [(c - n) // block_size if m.rng.random() < 0.5 else 0 for c, n in zip(contexts, counts, strict=True)]
    )
    tokens = sum(counts)
    query = m.floats(tokens, heads, dim)
    where = (tables, most, cu, torch.tensor(contexts, dtype=torch.int32), groups, shared.to(torch.int32))
    options = 0.3, m.rng.choice((0.0, 5.0)), m.size(20), m.maybe(m.single(heads))
    out, sizes = new(tokens, heads, dim, dtype=m.dtype), (tokens, len(counts), len(counts), 1)
    strides = query.stride()[:2]
    return [cache(m, blocks, kv_heads, dim, block_size), query, strides, heads, where, *options, out, sizes, None, RUN]


def write_kv_forward(m: Maker) -> Arguments:
    kv_heads, dim, block_size, blocks, n = m.size(2, 1), 2 * m.size(17, 1), 16, m.size(5, 1), m.size(6)
    heads = m.size(3, 1)
    rotates = m.rng.random() < 0.6
    cos, sin = (m.floats(n, dim) if rotates else None for _ in range(2))
    query = m.floats(n, heads, dim) if rotates and m.rng.random() < 0.6 else None
    key, value = m.floats(n, kv_heads, dim), m.floats(n, kv_heads, dim)
    strides = (0, 0) if query is None else query.stride()[:2]
    return [
        cache(m, blocks, kv_heads, dim, block_size), key, key.stride()[:2], value, value.stride()[:2],
        m.whole(blocks * block_size, n), n, cos, sin, query, strides, heads, RUN,
    ]  # fmt: skip


def rms_norm_forward(m: Maker) -> Arguments:
    rows, columns = m.size(), m.columns()
    x = m.floats(rows, columns + 3)
    return [
        x[:, :columns],
        columns + 3,
        m.floats(columns),
        new(rows, columns, dtype=m.dtype),
        rows,
        columns,
        1e-6,
        0.0,
        RUN,
    ]


def sample_forward(m: Maker) -> Arguments:
    rows, columns = m.size(), m.columns()
    uniform = torch.rand(rows, generator=m.generator, dtype=torch.float64)
    temperature = torch.rand(rows, generator=m.generator) * (m.rng.random() < 0.8)
    top_p, min_p = torch.rand(rows, generator=m.generator) + 0.01, torch.rand(rows, generator=m.generator) * 0.5
    options = (temperature, m.whole(columns, rows, dtype=torch.int32), top_p, min_p, uniform)
    results = (new(rows, dtype=torch.int64), new(rows), new(rows), new(rows))
    return [m.floats(rows, columns + 1)[:, :columns], rows, columns, columns + 1, options, results, RUN]


def sequence_sum_forward(m: Maker) -> Arguments:
    where, count, n = sequences(m)
    return [where, m.floats(n), m.mask(n), new(count), RUN]


def group_advantages_forward(m: Maker) -> Arguments:
    where, _, n = sequences(m)
    return [where, m.floats(n), m.mask(n), m.size(2), 1e-6, new(n), RUN]


ENTRIES: dict[str, Callable[[Maker], Arguments]] = {
    one.__name__: one
    for one in (
        token_logprobs_forward, token_logprobs_update, token_logprobs_finish, token_logprobs_gradient, full_kl_forward,
        full_kl_gradient, kl_estimate_forward, kl_estimate_gradient, gae_forward, ppo_loss_forward, ppo_loss_scale,
        pair_loss_forward, linear_forward, paged_attention_forward, write_kv_forward, rms_norm_forward, sample_forward,
        sequence_sum_forward, group_advantages_forward,
    )
}  # fmt: skip
