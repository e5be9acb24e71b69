"""Parts that the definitions share: masks, means, sequences."""

from __future__ import annotations

import torch
from torch import Tensor

Stats = dict[str, Tensor]


def widen(x: Tensor) -> Tensor:
    """float32 and float64 as they are, narrower floats in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def keep(x: Tensor, mask: Tensor | None, fill: float = 0.0) -> Tensor:
    """x widened, with ``fill`` (and no gradient) wherever the mask is False."""
    return widen(x) if mask is None else torch.where(mask, widen(x), fill)


def divide(total: Tensor, count: Tensor | float, denominator: float | Tensor | None) -> Tensor:
    """total / (denominator, or else count); a tensor of 0 counts as 1, so that nothing at all gives 0 and not NaN."""
    divisor = torch.as_tensor(count if denominator is None else denominator, device=total.device)
    return total / torch.where(divisor == 0, 1, divisor).to(total.dtype)


def inside_sequences(cu_seqlens: Tensor) -> Tensor:
    """(B, T) bool: True where the padded form of a packed batch holds a token; T is the longest sequence."""
    lengths = cu_seqlens.diff()
    longest = max(lengths.tolist(), default=0)
    return torch.arange(longest, device=cu_seqlens.device) < lengths[:, None]  # (B, T)


def to_padded(packed: Tensor, inside: Tensor) -> Tensor:
    """(N,) -> (B, T), zeros (False) past each sequence's end."""
    return packed.new_zeros(inside.shape).masked_scatter(inside, packed)  # (B, T)


def sequence_sum(x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Sum over each sequence's unmasked tokens."""
    x = keep(x, mask)
    return (x if cu_seqlens is None else to_padded(x, inside_sequences(cu_seqlens))).sum(1)  # (B,)
