"""Calls into rlhf_fast._C: tensors, strides and numbers. Serves the backends cpu and cuda alike.

The public functions have checked what is asked; that all memory is there, in the dtype that a kernel reads, the
compiled entries check themselves (csrc/given.h). Importing this never fails: without the compiled module, or without
CUDA in it, ``cpu`` or ``cuda`` is None.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import (
    Denominator,
    GAEInputs,
    Matrix,
    PairNumbers,
    PairResults,
    PairTensors,
    PPONumbers,
    PPOResults,
    PPOTensors,
    SampleOptions,
    Sequences,
    Transform,
)
from rlhf_fast.ops._rows import flat

try:
    _C: Any = importlib.import_module("rlhf_fast._C")
except ImportError:
    _C = None

cpu: Any = None if _C is None else _C.cpu
cuda: Any = getattr(_C, "cuda", None)

_Memory: Any = getattr(_C, "Memory", None)  # on Linux
_MOST_PARTS = 256 << 20  # bytes
_LARGE = 1 << 22  # bytes from which page faults cost more than a block of memory of our own


def module(backend: str) -> Any:
    return cuda if backend == "cuda" else cpu


def new_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory of x's shape and dtype (or this one), contiguous; large and on the CPU, as memory.h says."""
    dtype = dtype or x.dtype
    if x.device.type != "cpu" or x.numel() * dtype.itemsize < _LARGE:  # as new has it, in half the time
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return new(x.shape, dtype, x.device)


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device, large: int = _LARGE) -> Tensor:
    """Uninitialised memory of any shape, as new_like has it; from ``large`` bytes on a block of our own."""
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
    row: int = _C.first_outside(tokens, flat(mask), vocabulary)
    return row


def _run(device: torch.device) -> tuple[int, int, int]:
    """Place of a call: threads for the CPU; index and current stream for CUDA."""
    if device.type != "cuda":
        return torch.get_num_threads(), 0, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return 1, index, torch.cuda.current_stream(index).cuda_stream


class TokenLogprobs:
    """The kernels of token_logprobs; csrc/common/token_logprobs.h says what each does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)
        self.per_segment = backend == "cuda"  # one state for each segment of a row, or one for the row

    def segment(self, device: torch.device) -> int:
        """Columns of a segment of a row."""
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
            x, t, tokens, mask, states, per_row, results,
            _run(x.data.device),
        )  # fmt: skip

    def update(
        self, x: Matrix, t: Transform, tokens: Tensor, mask: Tensor | None, first_column: int, states: Tensor
    ) -> None:
        self.kernels.token_logprobs_update(
            x, t, tokens, mask, first_column, states,
            states.shape[1], _run(x.data.device),
        )  # fmt: skip

    def finish(self, states: Tensor, mask: Tensor | None, results: Sequence[Tensor]) -> None:
        self.kernels.token_logprobs_finish(
            states, states.shape[1], states.shape[0], mask, results,
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
            x, t, tokens, mask, first_column, results,
            (grad_logprobs, grad_entropy, grad_log_sum, grad_each), out, _run(x.data.device),
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
            p, q, t, mask, divergence, scratch, results,
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
            p, q, t, mask, divergence, results, grad,
            out_p, out_q, _run(p.data.device),
        )  # fmt: skip


class KLEstimate:
    """The kernels of kl_estimate; csrc/common/kl_estimate.h says what each does. All tensors are contiguous."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)

    def forward(self, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimate: int, out: Tensor) -> None:
        self.kernels.kl_estimate_forward(
            logprobs, ref_logprobs, mask,
            estimate, out, _run(out.device),
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
            logprobs, ref_logprobs, mask,
            estimate, grad, out, ref_out, _run(logprobs.device),
        )  # fmt: skip


class GAE:
    """The kernel of gae; csrc/common/gae.h says what it does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)

    def forward(self, x: GAEInputs, advantages: Tensor, returns: Tensor, sums: Tensor | None) -> None:
        *paid, kl_coef = x.paid
        self.kernels.gae_forward(
            x.sequences, paid, kl_coef, x.values, x.mask, x.bootstrap, x.decays,
            (advantages, returns, sums), _run(x.values.device),
        )  # fmt: skip


class PPOLoss:
    """The kernel of ppo_loss; csrc/common/ppo_loss.h says what it does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)
        self.SUMS: int = self.kernels.ppo_loss_sums

    def range_size(self, device: torch.device) -> int:
        """Tokens whose sums are one row of the partial results."""
        tokens: int = self.kernels.ppo_loss_range
        return tokens

    def forward(
        self,
        tensors: PPOTensors,
        numbers: PPONumbers,
        of_terms: Denominator,
        of_tokens: Denominator,
        results: PPOResults,
    ) -> None:
        where = _run(results.partials.device)
        self.kernels.ppo_loss_forward(tensors.per_token, tensors.others, numbers, of_terms, of_tokens, results, where)

    def scale(
        self, gradients: Sequence[Tensor | None], upstream: Tensor, inverse: Tensor, out: Sequence[Tensor | None]
    ) -> None:
        self.kernels.ppo_loss_scale(gradients, out, upstream, inverse, _run(inverse.device))


class PairLoss:
    """The kernel of dpo_loss and reward_loss; csrc/common/pair_loss.h says what it does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)

    def forward(
        self,
        tensors: PairTensors,
        numbers: PairNumbers,
        denominator: Denominator,
        results: PairResults,
    ) -> None:
        where = _run(results.stats.device)
        self.kernels.pair_loss_forward(tensors.rewards, tensors.others, numbers, denominator, results, where)


class SequenceSum:
    """The kernel of sequence_sum; csrc/common/sequence_sum.h says what it does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)

    def forward(self, where: Sequences, x: Tensor, mask: Tensor | None, out: Tensor) -> None:
        self.kernels.sequence_sum_forward(where, x, mask, out, _run(out.device))


class GroupAdvantages:
    """The kernel of group_advantages; csrc/common/group_advantages.h says what it does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)

    def forward(
        self, where: Sequences, rewards: Tensor, mask: Tensor | None, kind: int, eps: float, out: Tensor
    ) -> None:
        self.kernels.group_advantages_forward(where, rewards, mask, kind, eps, out, _run(out.device))


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
            _cache(cache), query, (query.stride(0), query.stride(1)), query.shape[1],
            (tables, tables.shape[1], cu_queries, contexts, groups, shared),
            scale, softcap, window, sinks, out, (tokens, len(contexts), len(shared), number), parts,
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
            _cache(cache), key, key.stride()[:2], value, value.stride()[:2], slots, slots.numel(), cos, sin, query,
            strides, heads, _run(key.device),
        )  # fmt: skip


def _cache(cache: Any) -> tuple[Tensor, Tensor, int, int, int, int]:
    keys, values, dim = cache
    _, kv_heads, width, block_size = keys.shape
    return keys, values, dim, kv_heads, width, block_size


class Sample:
    """The kernel of sample; csrc/common/sample.h says what it does."""

    def __init__(self, backend: str) -> None:
        self.kernels = module(backend)

    def forward(
        self,
        logits: Tensor,
        options: SampleOptions,
        results: Sequence[Tensor],
    ) -> None:
        where = _run(logits.device)
        self.kernels.sample_forward(logits, *logits.shape, logits.stride(0), options, results, where)


class Linear:
    """x (M, K) times some weights, on the CPU, prepared for many x; csrc/common/linear.h says what is computed.

    The weights may change in place. All tensors have the dtype of x, or the call is refused.
    """

    def __init__(self, weights: Sequence[Any], gate: int = 0) -> None:
        self.gate, self.k = gate, weights[0].weight.shape[1]
        self.columns = [w.weight.shape[0] for w in weights]
        self.results = 1 if gate else len(weights)
        self.parts = [(w.weight, w.weight.stride(0), w.weight.shape[0], w.bias, None, None, 0, 1.0) for w in weights]
        adapters = [(i, *w.lora) for i, w in enumerate(weights) if w.lora is not None]
        self.adapted = [i for i, *_ in adapters]
        self.lows = [(a, a.stride(0), a.shape[0], None, None, None, 0, scaling) for _, a, _, scaling in adapters]
        self.ups = [b for _, _, b, _ in adapters]

    def __call__(self, x: Tensor, add: Tensor | None = None) -> list[Tensor]:
        """x (M, K), rows contiguous; `add` (M, n), to be added to the one result."""
        rows, where = x.shape[0], _run(x.device)
        place, parts = (x, x.stride(0)), self.parts
        if self.adapted:  # the first factors of all adapters in one launch
            lows = [x.new_empty(rows, low[2]) for low in self.lows]
            outs = [(low, low.shape[1]) for low in lows]
            cpu.linear_forward(place, rows, self.k, self.lows, outs, (None, 0), 0, where)
            parts = list(parts)
            for i, low, up in zip(self.adapted, lows, self.ups, strict=True):
                parts[i] = (*parts[i][:4], low, up, low.shape[1], 1.0)
        results = [new((rows, n), x.dtype, x.device) for n in self.columns[: self.results]]
        outs = [(out, n) for out, n in zip(results, self.columns, strict=False)]
        added = (None, 0) if add is None else (add, add.stride(0))
        cpu.linear_forward(place, rows, self.k, parts, outs, added, self.gate, where)
        return results


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Normalise by the root mean square on the CPU; csrc/common/rms_norm.h says what is computed."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    cpu.rms_norm_forward(rows, rows.stride(0), weight, out, *rows.shape, eps, offset, _run(x.device))
    return out
