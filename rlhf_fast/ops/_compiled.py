"""Calls into rlhf_fast._C: tensors become addresses, strides and numbers. Serves the backends cpu and cuda alike.

Nothing is checked here; the public functions have done that. Importing this never fails: without the compiled module,
or without CUDA in it, ``cpu`` or ``cuda`` is None.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops._rows import (
    Denominator,
    GAEInputs,
    Matrix,
    PairInputs,
    PairOptions,
    PPOInputs,
    PPOOptions,
    Sequences,
    Transform,
    flat,
)

try:
    _C: Any = importlib.import_module("rlhf_fast._C")
except ImportError:
    _C = None

cpu: Any = None if _C is None else _C.cpu
cuda: Any = getattr(_C, "cuda", None)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_Memory: Any = getattr(_C, "Memory", None)  # on Linux
_MOST_PARTS = 256 << 20  # bytes
_LARGE = 1 << 22  # bytes from which page faults cost more than a block of memory of our own


def module(backend: str) -> Any:
    return cuda if backend == "cuda" else cpu


def new_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory of x's shape and dtype (or this one), contiguous; large and on the CPU, as memory.h says."""
    return new(x.shape, dtype or x.dtype, x.device)


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device, large: int = _LARGE) -> Tensor:
    """The same of any shape, and with another idea of how many bytes are large."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < large or _Memory is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(_Memory(size), dtype=dtype).resize_(shape)


def release_memory() -> None:
    """Give the large blocks that are kept for the next results back to the system."""
    if _Memory is not None:
        _Memory.release()


def first_outside(tokens: Tensor, vocabulary: int, mask: Tensor | None) -> int | None:
    """The first row whose token is not in [0, vocabulary), masked rows left out; -1 if none, None if this cannot
    say."""
    if _C is None or tokens.device.type != "cpu" or not tokens.is_contiguous():
        return None
    flags = flat(mask)
    row: int = _C.first_outside(_tokens(tokens), _address(flags), tokens.numel(), vocabulary)
    return row


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _tokens(tokens: Tensor) -> tuple[int, bool]:
    return tokens.data_ptr(), tokens.dtype == torch.int64


def _logits(m: Matrix) -> tuple[int, ...]:
    return m.data.data_ptr(), _DTYPES[m.data.dtype], *m[1:]


def _transform(t: Transform) -> tuple[float, float, float, int]:
    return *t[:3], _address(t.temperatures)


def _sequences(where: Sequences) -> tuple[int, bool, int, int]:
    is_int64 = where.cu_seqlens is not None and where.cu_seqlens.dtype == torch.int64
    return _address(where.cu_seqlens), is_int64, where.number, where.length


def _addresses(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple([0 if x is None else x.data_ptr() for x in tensors])


def _run(device: torch.device) -> tuple[int, int, int]:
    """Where it runs: threads for the CPU; index and current stream for CUDA."""
    if device.type != "cuda":
        return torch.get_num_threads(), 0, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return 1, index, torch.cuda.current_stream(index).cuda_stream


class TokenLogprobs:
    """The kernels of token_logprobs; csrc/common/token_logprobs.h says what each does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)
        self.per_segment = backend == "cuda"  # one state for each segment of a row, or one for the row

    def segment(self, _: torch.device) -> int:
        """Columns."""
        columns: int = self.kernels.token_logprobs_segment
        return columns

    def new_states(self, rows: int, vocabulary: int, device: torch.device) -> Tensor:
        if not self.per_segment:
            return torch.empty(rows, 1, _C.token_logprobs_state, dtype=torch.float64, device=device)
        segments = -(-vocabulary // self.segment(device))
        return torch.empty(rows, segments, _C.token_logprobs_state, dtype=torch.float32, device=device)

    def forward(
        self, x: Matrix, t: Transform, tokens: Tensor, mask: Tensor | None, results: Sequence[Tensor | None]
    ) -> None:
        states, per_row = None, 0
        if self.per_segment:
            states = self.new_states(x.rows, x.columns, x.data.device)
            per_row = states.shape[1]
        self.kernels.token_logprobs_forward(
            _logits(x), _transform(t), _tokens(tokens), _address(mask), _address(states), per_row, _addresses(results),
            _run(x.data.device),
        )  # fmt: skip

    def update(
        self, x: Matrix, t: Transform, tokens: Tensor, mask: Tensor | None, first_column: int, states: Tensor
    ) -> None:
        self.kernels.token_logprobs_update(
            _logits(x), _transform(t), _tokens(tokens), _address(mask), first_column, states.data_ptr(),
            states.shape[1], _run(x.data.device),
        )  # fmt: skip

    def finish(self, states: Tensor, mask: Tensor | None, results: Sequence[Tensor]) -> None:
        self.kernels.token_logprobs_finish(
            states.data_ptr(), states.shape[1], states.shape[0], _address(mask), _addresses(results),
            _run(states.device),
        )  # fmt: skip

    def gradient(
        self,
        x: Matrix,
        t: Transform,
        tokens: Tensor,
        mask: Tensor | None,
        first_column: int,
        results: Sequence[Tensor],
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        out: Tensor,
        grad_log_sum: Tensor | None = None,
        grad_each: Tensor | None = None,
    ) -> None:
        self.kernels.token_logprobs_gradient(
            _logits(x), _transform(t), _tokens(tokens), _address(mask), first_column, _addresses(results),
            _addresses((grad_logprobs, grad_entropy, grad_log_sum, grad_each)), out.data_ptr(), _run(x.data.device),
        )  # fmt: skip


class FullKL:
    """The kernels of full_kl; csrc/common/full_kl.h says what each does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)
        self.per_segment = backend == "cuda"

    def forward(
        self, p: Matrix, q: Matrix, t: Transform, mask: Tensor | None, divergence: int, results: Sequence[Tensor]
    ) -> None:
        scratch = None
        if self.per_segment:
            segments = -(-p.columns // self.kernels.full_kl_segment)
            scratch = torch.empty(p.rows, segments, self.kernels.full_kl_state, device=p.data.device)
        self.kernels.full_kl_forward(
            _logits(p), _logits(q), _transform(t), _address(mask), divergence, _address(scratch), _addresses(results),
            _run(p.data.device),
        )  # fmt: skip

    def gradient(
        self,
        p: Matrix,
        q: Matrix,
        t: Transform,
        mask: Tensor | None,
        divergence: int,
        results: Sequence[Tensor],
        grad: Tensor,
        out_p: Tensor | None,
        out_q: Tensor | None,
    ) -> None:
        self.kernels.full_kl_gradient(
            _logits(p), _logits(q), _transform(t), _address(mask), divergence, _addresses(results), grad.data_ptr(),
            _address(out_p), _address(out_q), _run(p.data.device),
        )  # fmt: skip


class KLEstimate:
    """The kernels of kl_estimate; csrc/common/kl_estimate.h says what each does. All tensors are contiguous."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)

    def forward(self, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimate: int, out: Tensor) -> None:
        self.kernels.kl_estimate_forward(
            logprobs.data_ptr(), ref_logprobs.data_ptr(), _DTYPES[logprobs.dtype], logprobs.numel(), _address(mask),
            estimate, out.data_ptr(), _run(out.device),
        )  # fmt: skip

    def gradient(
        self,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        mask: Tensor | None,
        estimate: int,
        grad: Tensor,
        out: Tensor | None,
        ref_out: Tensor | None,
    ) -> None:
        self.kernels.kl_estimate_gradient(
            logprobs.data_ptr(), ref_logprobs.data_ptr(), _DTYPES[logprobs.dtype], logprobs.numel(), _address(mask),
            estimate, grad.data_ptr(), _address(out), _address(ref_out), _run(logprobs.device),
        )  # fmt: skip


class GAE:
    """The kernel of gae; csrc/common/gae.h says what it does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)

    def forward(self, x: GAEInputs, advantages: Tensor, returns: Tensor, sums: Tensor | None) -> None:
        is_int64 = x.cu_seqlens is not None and x.cu_seqlens.dtype == torch.int64
        self.kernels.gae_forward(
            (_address(x.cu_seqlens), is_int64, x.sequences, x.length), _addresses(x[:4]), x.kl_coef,
            x.values.data_ptr(), _DTYPES[x.values.dtype], _address(x.mask), _address(x.bootstrap), x[-3:],
            _addresses((advantages, returns, sums)), _run(x.values.device),
        )  # fmt: skip


class PPOLoss:
    """The kernel of ppo_loss; csrc/common/ppo_loss.h says what it does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)
        self.SUMS: int = self.kernels.ppo_loss_sums

    def range_size(self, _: torch.device) -> int:
        """Tokens."""
        tokens: int = self.kernels.ppo_loss_range
        return tokens

    def forward(
        self,
        x: PPOInputs,
        options: PPOOptions,
        of_terms: Denominator,
        of_tokens: Denominator,
        numbers: tuple[Tensor, Tensor, Tensor],
        gradients: Sequence[Tensor | None],
        partials: Tensor,
    ) -> None:
        """``numbers``: the loss, the statistics, and the inverse of what divides the loss's terms."""
        self.kernels.ppo_loss_forward(
            _addresses(x[:9]), _DTYPES[x.logprobs.dtype], x.logprobs.numel(), _addresses(x[9:]), options,
            (_address(of_terms.there), of_terms.number), (_address(of_tokens.there), of_tokens.number),
            _addresses((*numbers, *gradients, partials)), _run(partials.device),
        )  # fmt: skip

    def scale(
        self, gradients: Sequence[Tensor | None], upstream: Tensor, inverse: Tensor, out: Sequence[Tensor | None]
    ) -> None:
        count = max(x.numel() for x in gradients if x is not None)
        self.kernels.ppo_loss_scale(
            _addresses(gradients), _addresses(out), count, upstream.data_ptr(), inverse.data_ptr(),
            _run(inverse.device),
        )  # fmt: skip


class PairLoss:
    """The kernel of dpo_loss and reward_loss; csrc/common/pair_loss.h says what it does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)

    def forward(
        self,
        x: PairInputs,
        options: PairOptions,
        of_pairs: Denominator,
        stats: Tensor,
        gradients: Sequence[Tensor | None],
    ) -> None:
        self.kernels.pair_loss_forward(
            _addresses(x[:4]), _DTYPES[x.chosen.dtype], x.chosen.numel(), _addresses(x[4:]), options,
            (_address(of_pairs.there), of_pairs.number), _addresses((stats, *gradients)), _run(stats.device),
        )  # fmt: skip


class SequenceSum:
    """The kernel of sequence_sum; csrc/common/sequence_sum.h says what it does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)

    def forward(self, where: Sequences, x: Tensor, mask: Tensor | None, out: Tensor) -> None:
        self.kernels.sequence_sum_forward(
            _sequences(where), x.data_ptr(), _DTYPES[x.dtype], _address(mask), out.data_ptr(), _run(out.device)
        )


class GroupAdvantages:
    """The kernel of group_advantages; csrc/common/group_advantages.h says what it does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)

    def forward(
        self, where: Sequences, rewards: Tensor, mask: Tensor | None, kind: int, eps: float, out: Tensor
    ) -> None:
        self.kernels.group_advantages_forward(
            _sequences(where), rewards.data_ptr(), _DTYPES[rewards.dtype], _address(mask), kind, eps, out.data_ptr(),
            _run(out.device),
        )  # fmt: skip


class PagedAttention:
    """The kernels of paged_attention and write_kv; csrc/common/paged_attention.h says what they do."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)
        self.splits = backend == "cuda"  # keys over warps, where their results fit into memory

    def forward(
        self,
        query: Tensor,
        cache: Any,
        batch: Any,
        scale: float,
        softcap: float,
        window: int,
        sinks: Tensor | None,
        out: Tensor,
    ) -> None:
        tables, cu_queries, contexts, groups, shared, _ = batch
        (tokens, heads, _), width, number = query.shape, cache.keys.shape[2], 1
        parts = None
        if self.splits:
            positions = tables.shape[1] * cache.keys.shape[3]
            number = -(-positions // self.kernels.paged_attention_part)
            size = tokens * heads * number * (width + 2)
            if number > 1 and 4 * size <= _MOST_PARTS:
                parts = torch.empty(size, dtype=torch.float32, device=query.device)
        self.kernels.paged_attention_forward(
            _cache(cache), query.data_ptr(), (query.stride(0), query.stride(1)), query.shape[1],
            (tables.data_ptr(), tables.stride(0), *_addresses((cu_queries, contexts, groups, shared)), len(shared)),
            scale, softcap, window, _address(sinks), out.data_ptr(), (tokens, len(contexts), number), _address(parts),
            _run(query.device),
        )  # fmt: skip

    def write(
        self,
        cache: Any,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        query: Tensor | None,
    ) -> None:
        strides, heads = ((0, 0), 0) if query is None else (query.stride()[:2], query.shape[1])
        self.kernels.write_kv_forward(
            _cache(cache), key.data_ptr(), key.stride()[:2], value.data_ptr(), value.stride()[:2], slots.data_ptr(),
            slots.numel(), _address(cos), _address(sin), _address(query), strides, heads, _run(key.device),
        )  # fmt: skip


def _cache(cache: Any) -> tuple[int, ...]:
    keys, values, dim = cache
    _, kv_heads, width, block_size = keys.shape
    return keys.data_ptr(), values.data_ptr(), _DTYPES[keys.dtype], kv_heads, dim, width, block_size


class Sample:
    """The kernel of sample; csrc/common/sample.h says what it does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)

    def forward(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        uniform: Tensor,
        results: Sequence[Tensor],
    ) -> None:
        self.kernels.sample_forward(
            logits.data_ptr(), _DTYPES[logits.dtype], *logits.shape, logits.stride(0),
            _addresses((temperature, top_k, top_p, min_p, uniform)), _addresses(results), _run(logits.device),
        )  # fmt: skip


class Linear:
    """x (M, K) times some weights, on the CPU, prepared for many x; csrc/common/linear.h says what is computed.

    The weights may change in place, and must stay where they are.
    """

    def __init__(self, weights: Sequence[Any], gate: int = 0) -> None:
        self.gate, self.k, first = gate, weights[0].weight.shape[1], weights[0].weight
        self.dtype, self.columns = _DTYPES[first.dtype], [one.weight.shape[0] for one in weights]
        self.results = 1 if gate else len(weights)
        self.parts = [
            (one.weight.data_ptr(), one.weight.stride(0), one.weight.shape[0], _address(one.bias), 0, 0, 0, 1.0)
            for one in weights
        ]
        adapters = [(i, *one.lora) for i, one in enumerate(weights) if one.lora is not None]
        self.adapted = [i for i, *_ in adapters]
        self.lows = [(a.data_ptr(), a.stride(0), a.shape[0], 0, 0, 0, 0, scaling) for _, a, _, scaling in adapters]
        self.ups = [(b.data_ptr(), b.shape[1]) for _, _, b, _ in adapters]

    def __call__(self, x: Tensor, add: Tensor | None = None) -> list[Tensor]:
        """x (M, K), rows contiguous; `add` (M, n), to be added to the one result."""
        rows, where = x.shape[0], _run(x.device)
        place, parts = (x.data_ptr(), x.stride(0)), self.parts
        if self.adapted:  # the first factors of all adapters in one launch
            lows = [x.new_empty(rows, low[2]) for low in self.lows]
            outs = [(low.data_ptr(), low.shape[1]) for low in lows]
            cpu.linear_forward(place, self.dtype, rows, self.k, self.lows, outs, (0, 0), 0, where)
            parts = list(parts)
            for i, (low, _), (up, rank) in zip(self.adapted, outs, self.ups, strict=True):
                parts[i] = (*parts[i][:4], low, up, rank, 1.0)
        results = [new((rows, n), x.dtype, x.device) for n in self.columns[: self.results]]
        outs = [(out.data_ptr(), n) for out, n in zip(results, self.columns, strict=False)]
        added = (0, 0) if add is None else (add.data_ptr(), add.stride(0))
        cpu.linear_forward(place, self.dtype, rows, self.k, parts, outs, added, self.gate, where)
        return results


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """On the CPU; csrc/common/rms_norm.h says what is computed."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    cpu.rms_norm_forward(
        rows.data_ptr(), rows.stride(0), weight.data_ptr(), out.data_ptr(), _DTYPES[x.dtype], *rows.shape, eps, offset,
        _run(x.device),
    )  # fmt: skip
    return out
