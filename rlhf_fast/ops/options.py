"""Options of the losses, by name: checked where they are made, and packed as the kernels have them.

To add one: its field and check here, its number here, in kernels/arguments.py and in csrc/common, and what the
reference and the kernels make of it. tests/unit/ops/test_contracts.py asks for a row that shows its effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import PPO_PER_TOKEN, PairNumbers, PPONumbers, PPOTensors
from rlhf_fast.ops import _checks
from rlhf_fast.ops._checks import LEAST_TEMPERATURE as LEAST_TEMPERATURE  # for the rooms above

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum_mean")
ESTIMATES = ("k1", "k2", "k3")  # of the KL, as csrc/common/kl_estimate.h numbers them
KL_KINDS = ("k1", "k2", "k3", "k1+", "k3+")  # an estimate; with a plus, with the gradient of k2
OBJECTIVES = ("clip", "cispo", "sapo")  # as csrc/common/ppo_loss.h numbers them
PAIR_KINDS = ("logistic", "hinge", "ipo", "kto")  # as csrc/common/pair_loss.h numbers them
PAIR_LOSSES = ("sigmoid", "robust", "hinge", "ipo", "kto")
RATIOS = ("token", "sequence")


@dataclass(frozen=True)
class PPOOptions:
    """Options of :func:`rlhf_fast.ops.ppo_loss`, whose docstring says what each does."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl: str = "k3"
    aggregation: str = "token_mean"
    objective: str = "clip"
    ratio: str = "token"
    rollout_cap: float = 2.0
    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        _checks.number("clip_low", self.clip_low, least=0)
        _checks.number("clip_high", self.clip_high, least=0)
        if self.dual_clip is not None:
            _checks.number("dual_clip", self.dual_clip, above=1)
        if self.value_clip is not None:
            _checks.number("value_clip", self.value_clip, least=0)
        _checks.number("value_coef", self.value_coef, least=0)
        _checks.number("entropy_coef", self.entropy_coef)
        _checks.number("kl_coef", self.kl_coef, least=0)
        _checks.option("kl", self.kl, KL_KINDS)
        _checks.option("objective", self.objective, OBJECTIVES)
        _checks.option("ratio", self.ratio, RATIOS)
        if self.objective != "clip" and self.dual_clip is not None:
            raise ValueError(f"dual_clip: {self.dual_clip}, expected None because objective is {self.objective!r}")
        _checks.number("rollout_cap", self.rollout_cap, above=0)
        _checks.number("tau_pos", self.tau_pos, above=0)
        _checks.number("tau_neg", self.tau_neg, above=0)
        _checks.option("aggregation", self.aggregation, AGGREGATIONS)

    def numbers(self) -> PPONumbers:
        """Pack for the kernels. Aggregation and ratio reach them as weights and log-ratios of tokens instead."""
        return PPONumbers(
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=0.0 if self.dual_clip is None else self.dual_clip,
            value_clip=-1.0 if self.value_clip is None else self.value_clip,
            value_coef=self.value_coef,
            entropy_coef=self.entropy_coef,
            kl_coef=self.kl_coef,
            rollout_cap=self.rollout_cap,
            tau_pos=self.tau_pos,
            tau_neg=self.tau_neg,
            objective=OBJECTIVES.index(self.objective),
            kl=ESTIMATES.index(self.kl[:2]),
            kl_slope=ESTIMATES.index("k2" if self.kl.endswith("+") else self.kl),
        )


def check_ppo_tensors(
    tensors: PPOTensors, options: PPOOptions, cu_seqlens: Tensor | None, like: str, shape: Sequence[int]
) -> None:
    """Check that per-token tensors have the shape of ``like`` and that every term that is asked for has its tensors."""
    x = tensors
    if not _checks.are_alike(tensors.per_token, shape):
        per_token = dict(zip(PPO_PER_TOKEN, tensors.per_token, strict=True))
        _checks.floats(**per_token)
        _checks.shapes(shape, like, **per_token)
        _checks.devices(**per_token)
    _checks.masks(shape, like, x.mask)
    _checks.devices(logprobs=x.logprobs, old_logprobs=x.old_logprobs, mask=x.mask, cu_seqlens=cu_seqlens)
    if x.values is None and (x.returns is not None or x.old_values is not None):
        raise ValueError("values: None, expected a tensor because returns or old_values is given")
    if x.values is not None and x.returns is None:
        raise ValueError("returns: None, expected a tensor because values is given")
    if x.values is not None and options.value_clip is not None and x.old_values is None:
        raise ValueError("old_values: None, expected a tensor because value_clip is not None")
    if options.kl_coef != 0 and x.ref_logprobs is None:
        raise ValueError("ref_logprobs: None, expected a tensor because kl_coef is not 0")
    if options.entropy_coef != 0 and x.entropy is None and x.logprobs is not None:
        raise ValueError("entropy: None, expected a tensor because entropy_coef is not 0")
    if x.advantage_sums is not None and (x.advantage_sums.shape != (3,) or x.advantage_sums.dtype != torch.float64):
        dtype = str(x.advantage_sums.dtype).removeprefix("torch.")
        raise ValueError(
            f"advantage_sums: {dtype} of shape {tuple(x.advantage_sums.shape)}, expected float64 of shape (3,), "
            "as gae(..., sums=True) returns them"
        )


def check_aggregation(
    options: PPOOptions, tokens: Tensor, cu_seqlens: Tensor | None, denominator: float | Tensor | None
) -> None:
    """Check that the sequences of ``tokens``, any per-token tensor, can be told apart where the options need that."""
    _checks.denominators(denominator)
    if cu_seqlens is not None or tokens.dim() != 1:
        _checks.sequences("logprobs", tokens, cu_seqlens)
    elif options.aggregation != "token_mean":
        raise ValueError(
            f"cu_seqlens: None, expected (B + 1,) because aggregation is {options.aggregation!r} of (N,) tensors"
        )
    elif options.ratio == "sequence":
        raise ValueError("cu_seqlens: None, expected (B + 1,) because ratio is 'sequence' of (N,) tensors")


@dataclass(frozen=True)
class PairOptions:
    """Options of :func:`rlhf_fast.ops.dpo_loss` and :func:`rlhf_fast.ops.reward_loss`, whose docstrings say what each
    does. The rewards of reward_loss are scores: its beta is 1."""

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    center_coef: float = 0.0

    def __post_init__(self) -> None:
        e = self.label_smoothing
        _checks.number("beta", self.beta, above=0)
        _checks.option("loss", self.loss, PAIR_LOSSES)
        _checks.number("center_coef", self.center_coef, least=0)
        _checks.number("label_smoothing", e, least=0, most=0.5)
        if e != 0 and (self.loss not in ("sigmoid", "robust") or (self.loss == "robust" and e == 0.5)):
            raise ValueError(f"label_smoothing: {e}, expected less than 0.5 and loss 'sigmoid' or 'robust'")

    def numbers(self) -> PairNumbers:
        """Pack for the kernels, to which "sigmoid" and "robust" are one loss with two pairs of weights."""
        agree, differ = 1.0 - self.label_smoothing, self.label_smoothing
        if self.loss == "robust":
            agree, differ = agree / (1 - 2 * differ), -differ / (1 - 2 * differ)
        return PairNumbers(
            kind=PAIR_KINDS.index("logistic" if self.loss in ("sigmoid", "robust") else self.loss),
            beta=self.beta,
            agree=agree,
            differ=differ,
            center_coef=self.center_coef,
        )
