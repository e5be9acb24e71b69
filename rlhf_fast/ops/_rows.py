"""Tensors as kernels are given them: memory that may be read, as a matrix of rows; the transform of a logit."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import Denominator, Matrix, Transform

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(tensors: list[Tensor]) -> bool:
    """Return whether only autograd would look at a call with these tensors, so that their memory may be read."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return all([type(x) in _PLAIN and not x.is_meta for x in tensors])


def matrix(x: Tensor) -> Matrix:
    """x as rows. Copies only a tensor whose leading dimensions do not fold into two levels."""
    if x.is_contiguous():
        columns = x.shape[-1]
        rows = x.numel() // max(columns, 1)
        return Matrix(x, rows, columns, max(rows, 1), 0, columns, 1)
    if x.dim() > 3:
        x = x.flatten(0, -3)
    shape, stride = (1, 1, *x.shape)[-3:], (0, 0, *x.stride())[-3:]
    return Matrix(x, shape[0] * shape[1], shape[2], max(shape[1], 1), *stride)


def transform(temperatures: Tensor | None, temperature: float, softcap: float | None, logit_scale: float) -> Transform:
    return Transform(logit_scale, softcap or 0.0, temperature, flat(temperatures))


def per_row(temperature: float | Tensor, rows: torch.Size) -> tuple[Tensor | None, float]:
    """A temperature as (one float32 a row, unused) or (None, number): what a registered op's signature can hold."""
    if isinstance(temperature, Tensor):
        return temperature.detach().float().expand(rows), 1.0
    return None, float(temperature)


def flat(x: Tensor | None) -> Tensor | None:
    """(...) as contiguous (rows,)."""
    return None if x is None else x.reshape(-1).contiguous()


@overload
def plain(x: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def plain(x: None, dtype: torch.dtype) -> None: ...
def plain(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x in that dtype, contiguous."""
    if x is None or (x.dtype == dtype and x.is_contiguous()):  # at once, for most are
        return x
    return x.to(dtype).contiguous()


def divisor_of(denominator: float | Tensor | None) -> Denominator:
    """Divisor of a loss for the public argument ``denominator``, detached."""
    if denominator is None:
        return Denominator()
    if isinstance(denominator, Tensor):
        return Denominator(tensor=denominator.detach())
    return Denominator(number=float(denominator))
