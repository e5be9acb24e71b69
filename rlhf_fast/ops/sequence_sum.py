"""sequence_sum: one sum per sequence, padded or packed."""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import Sequences
from rlhf_fast.ops import _checks, compiled, dispatch, reference
from rlhf_fast.ops._library import Op
from rlhf_fast.ops._rows import plain

# torch.library reads the annotations of registered functions and knows no other form of Optional.
# ruff: noqa: UP045

BACKENDS = ("cpu", "cuda", "triton", "reference")


def sequence_sum(x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Sum of x over each sequence's unmasked tokens: for DPO, log pi(y | x) = sum_t log pi(y_t | x, y_<t).

    Position t of every input is of the same predicted token: x as :func:`token_logprobs` gives it, and its mask.

    Args:
        x: (B, T) padded, or (N,) packed with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        mask: same shape, bool, or None for all. Where False, x adds nothing, gets gradient 0 and may hold anything.
        cu_seqlens: (B + 1,), int32 or int64: sequence b is [cu_seqlens[b], cu_seqlens[b + 1]).

    Returns:
        (B,), float32 (float64 for float64 x), added up in float64; 0 for a sequence without an unmasked token.

    Raises:
        TypeError, ValueError: dtype, shape or device do not fit, or cu_seqlens does not run from 0 to N without
            falling (its values: on a CPU always, elsewhere under ``RLHF_FAST_DEBUG=1``).
    """
    _checks.floats(x=x)
    _checks.devices(x=x, mask=mask, cu_seqlens=cu_seqlens)
    sequences = _checks.sequences("x", x, cu_seqlens)
    _checks.masks(x.shape, "x", mask)
    backend = dispatch.choose("sequence_sum", BACKENDS, x)
    if backend == "reference":
        return reference.sequence_sum(x, mask, cu_seqlens)
    return sums_of(x, mask, cu_seqlens, sequences, backend)


def sums_of(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, sequences: int, backend: str) -> Tensor:
    sums: Tensor = _op(x, mask, cu_seqlens, sequences, backend)
    return sums


@functools.cache
def kernels(backend: str) -> Any:
    """The kernel of a backend: forward (see csrc/common/sequence_sum.h)."""
    if backend == "triton":
        from rlhf_fast.kernels import sequence_sum

        return sequence_sum
    return compiled.SequenceSum(backend)


def spread(x: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B,) as (B, T), or as (N,): each token's is that of its sequence."""
    if cu_seqlens is None:
        return x[:, None].expand(like.shape)
    return x.repeat_interleave(cu_seqlens.diff(), output_size=like.shape[0])


def sequence_sum_forward(
    x: Tensor, mask: Optional[Tensor], cu_seqlens: Optional[Tensor], sequences: int, backend: str
) -> Tensor:
    sums = x.new_empty(sequences, dtype=torch.float32)
    if sequences:
        where = Sequences(None if cu_seqlens is None else cu_seqlens.contiguous(), sequences, x.shape[-1])
        kernels(backend).forward(where, x.contiguous(), plain(mask, torch.bool), sums)
    return sums


def sequence_sum_backward(upstream: Tensor, x: Tensor, mask: Optional[Tensor], cu_seqlens: Optional[Tensor]) -> Tensor:
    """Give each token its sequence's gradient. Knows x, so that autograd refuses to go on from it."""
    gradient = spread(upstream, x, cu_seqlens).to(x.dtype)
    return gradient.clone() if mask is None else torch.where(mask, gradient, 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask, cu_seqlens, *_ = inputs
    ctx.save_for_backward(x, mask, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None) -> dict[str, Tensor]:
    return {} if upstream is None else {"x": _backward_op(upstream, *ctx.saved_tensors)}


def _fake_forward(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, sequences: int, backend: str) -> Tensor:
    return x.new_empty(sequences, dtype=torch.float32)


def _fake_backward(upstream: Tensor, x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_op = Op(sequence_sum_forward, _fake_forward, _setup_context, _backward)
_backward_op = Op(sequence_sum_backward, _fake_backward)
