"""sequence_sum: one sum per sequence, padded or packed."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.ops import _checks, _dispatch, reference

BACKENDS = ("reference",)


def sequence_sum(x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Sum of x over each sequence's unmasked tokens: for DPO, log pi(y | x) = sum_t log pi(y_t | x, y_<t).

    Args:
        x: (B, T) padded, or (N,) packed with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        mask: same shape, bool, or None for all. Where False, x adds nothing, gets gradient 0 and may hold anything.
        cu_seqlens: (B + 1,), int32 or int64: sequence b is [cu_seqlens[b], cu_seqlens[b + 1]).

    Returns:
        (B,), float32 (float64 for float64 x); 0 for a sequence without an unmasked token.

    Raises:
        TypeError, ValueError: dtype, shape or device do not fit, or cu_seqlens does not run from 0 to N without
            falling (its values: on a CPU always, elsewhere under ``RLHF_FAST_DEBUG=1``).
    """
    _checks.floats(x=x)
    _checks.devices(x=x, mask=mask, cu_seqlens=cu_seqlens)
    _checks.sequences("x", x, cu_seqlens)
    _checks.masks(x.shape, "x", mask)
    _dispatch.choose("sequence_sum", BACKENDS, x)
    return reference.sequence_sum(x, mask, cu_seqlens)
