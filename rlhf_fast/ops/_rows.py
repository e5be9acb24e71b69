"""What kernels are given: memory that may be read, as a matrix of rows; the transform of a logit; arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(tensors: list[Tensor]) -> bool:
    """Whether only autograd would look at a call with these tensors, so that their memory may be read at once."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return all([type(x) in _PLAIN and not x.is_meta for x in tensors])


class Matrix(NamedTuple):
    """The rows of a tensor (..., columns) of any strides, in elements: row r starts at
    ``(r // inner) * outer_stride + (r % inner) * inner_stride``. Two levels, so that ``logits[:, :-1]`` needs no
    copy."""

    data: Tensor
    rows: int
    columns: int
    inner: int
    outer_stride: int
    inner_stride: int
    column_stride: int


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


class Transform(NamedTuple):
    """z = softcap * tanh(scale * x / softcap) / temperature; a softcap of 0 means none."""

    scale: float
    softcap: float
    temperature: float
    temperatures: Tensor | None  # (rows,) float32, in place of the number


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


def plain(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x in that dtype, contiguous."""
    return None if x is None else x.to(dtype).contiguous()


class Sequences(NamedTuple):
    """Where the sequences of a batch lie."""

    cu_seqlens: Tensor | None  # contiguous; None: padded
    number: int
    length: int  # of each, if padded


class GAEInputs(NamedTuple):
    """What csrc/common/gae.h has under this name; all tensors contiguous."""

    rewards: Tensor | None
    logprobs: Tensor | None
    ref_logprobs: Tensor | None
    scores: Tensor | None
    kl_coef: float
    values: Tensor
    mask: Tensor | None
    bootstrap: Tensor | None
    cu_seqlens: Tensor | None  # None: padded
    sequences: int
    length: int  # of each, if padded
    gamma: float
    lam: float
    critic_lam: float


class PPOInputs(NamedTuple):
    """What csrc/common/ppo_loss.h has under this name; all tensors contiguous, those of tokens of one dtype."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    values: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    entropy: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    mask: Tensor | None
    weights: Tensor | None  # float32
    log_ratios: Tensor | None  # float32
    advantage_sums: Tensor | None  # float64


class PPOOptions(NamedTuple):
    clip_low: float
    clip_high: float
    dual_clip: float  # 0: none
    value_clip: float  # below 0: none
    value_coef: float
    entropy_coef: float
    kl_coef: float
    rollout_cap: float
    cispo: bool
    kl: int  # as csrc/common/kl_estimate.h numbers the estimates
    kl_slope: int  # the one whose gradient it gets


class PairInputs(NamedTuple):
    """What csrc/common/pair_loss.h has under this name; all tensors contiguous, the first four of one dtype."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    margins: Tensor | None  # float32, as those below
    weights: Tensor | None
    kl: Tensor | None


class PairOptions(NamedTuple):
    kind: int  # as csrc/common/pair_loss.h numbers them
    beta: float
    agree: float
    differ: float
    center_coef: float


class Denominator(NamedTuple):
    there: Tensor | None  # a number on the device
    number: float  # without it; 0: the tokens (or the weights of the pairs) that count

    @property
    def kind(self) -> int:
        return 1 if self.there is not None else 2 if self.number else 0
