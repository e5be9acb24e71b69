"""What kernels are given, whichever language they are written in: memory as rows, tensors, options."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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


class Transform(NamedTuple):
    """z = softcap * tanh(scale * x / softcap) / temperature; a softcap of 0 means none."""

    scale: float
    softcap: float
    temperature: float
    temperatures: Tensor | None  # (rows,) float32, in place of the number


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
