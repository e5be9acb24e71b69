"""The losses of pairs: DPO and its relatives, and Bradley-Terry."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops.reference.common import Stats, divide, keep, sequence_sum, widen
from rlhf_fast.ops.reference.linear import linear_token_logprobs


def weighted_mean(weights: Tensor | None, count: int, denominator: float | Tensor | None) -> Callable[[Tensor], Tensor]:
    """Means over pairs: by the sum of the weights, or the denominator."""

    def mean(x: Tensor) -> Tensor:
        if weights is None:
            return divide(x.sum(), count, denominator)
        w = widen(weights.detach()).to(x.dtype)
        return divide((x * w).sum(), w.sum(), denominator)

    return mean


def logistic(difference: Tensor, agree: float, differ: float) -> Tensor:
    """-agree log sigmoid(x) - differ log sigmoid(-x)."""
    return -agree * F.logsigmoid(difference) - differ * F.logsigmoid(-difference)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    denominator: float | Tensor | None = None,
    loss: str = "sigmoid",
    weights: Tensor | None = None,
    kl: float | Tensor = 0.0,
) -> tuple[Tensor, Stats]:
    """The loss of beta log(pi/ref)(chosen) and beta log(pi/ref)(rejected); x their difference."""
    mean = weighted_mean(weights, chosen.numel(), denominator)
    counts = None if weights is None else weights != 0
    chosen_reward = beta * (keep(chosen, counts) - keep(ref_chosen.detach(), counts))  # (P,)
    rejected_reward = beta * (keep(rejected, counts) - keep(ref_rejected.detach(), counts))
    x, e = chosen_reward - rejected_reward, label_smoothing
    if loss == "sigmoid":
        terms = logistic(x, 1 - e, e)
    elif loss == "robust":
        terms = logistic(x, (1 - e) / (1 - 2 * e), -e / (1 - 2 * e))
    elif loss == "hinge":
        terms = F.relu(1 - x)
    elif loss == "ipo":
        terms = ((x - 0.5) / beta).square()
    else:
        far = beta * (kl.detach() if isinstance(kl, Tensor) else kl)
        terms = (torch.sigmoid(far - chosen_reward) + torch.sigmoid(rejected_reward - far)) / 2
    return mean(terms), {
        "accuracy": mean((x.detach().sign() + 1) / 2),
        "margin": mean(x.detach()),
        "chosen_reward": mean(chosen_reward.detach()),
        "rejected_reward": mean(rejected_reward.detach()),
    }


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    denominator: float | Tensor | None = None,
    loss: str = "sigmoid",
    weights: Tensor | None = None,
    kl: float | Tensor = 0.0,
    average: bool = False,
) -> tuple[Tensor, Stats]:
    """dpo_loss of the summed (or mean) log-probabilities of 2P sequences, chosen ones first."""
    logprobs, _ = linear_token_logprobs(hidden, weight, tokens, bias, lora, 1.0, softcap, logit_scale, mask)
    sums = sequence_sum(logprobs, mask, cu_seqlens)  # (2P,)
    if average:
        sums = sums / sequence_sum(torch.ones_like(logprobs), mask, cu_seqlens).clamp(min=1)
    chosen, rejected = sums[: sums.numel() // 2], sums[sums.numel() // 2 :]
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing, denominator, loss, weights, kl)


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
    denominator: float | Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Bradley-Terry: logistic(chosen - rejected - margin) + center_coef * (chosen + rejected)^2."""
    mean = weighted_mean(weights, chosen.numel(), denominator)
    counts = None if weights is None else weights != 0
    chosen, rejected = keep(chosen, counts), keep(rejected, counts)  # (P,)
    difference = chosen - rejected
    wanted = keep(margin.detach(), counts) if isinstance(margin, Tensor) else (margin or 0.0)
    terms = logistic(difference - wanted, 1 - label_smoothing, label_smoothing)
    if center_coef != 0:
        terms = terms + center_coef * (chosen + rejected).square()
    return mean(terms), {
        "accuracy": mean((difference.detach().sign() + 1) / 2),
        "margin": mean(difference.detach()),
    }
