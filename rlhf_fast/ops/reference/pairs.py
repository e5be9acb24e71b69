"""The losses of pairs: DPO and its relatives, and Bradley-Terry."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.kernels.arguments import PairTensors
from rlhf_fast.ops.options import PairOptions
from rlhf_fast.ops.reference.common import Stats, divide, keep, widen


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


def dpo_loss(tensors: PairTensors, options: PairOptions, denominator: float | Tensor | None) -> tuple[Tensor, Stats]:
    """The loss of beta log(pi/ref)(chosen) and beta log(pi/ref)(rejected); x their difference."""
    t, beta, loss = tensors, options.beta, options.loss
    assert t.ref_chosen is not None and t.ref_rejected is not None
    mean = weighted_mean(t.weights, t.chosen.numel(), denominator)
    counts = None if t.weights is None else t.weights != 0
    chosen_reward = beta * (keep(t.chosen, counts) - keep(t.ref_chosen.detach(), counts))  # (P,)
    rejected_reward = beta * (keep(t.rejected, counts) - keep(t.ref_rejected.detach(), counts))
    x, e = chosen_reward - rejected_reward, options.label_smoothing
    if loss == "sigmoid":
        terms = logistic(x, 1 - e, e)
    elif loss == "robust":
        terms = logistic(x, (1 - e) / (1 - 2 * e), -e / (1 - 2 * e))
    elif loss == "hinge":
        terms = F.relu(1 - x)
    elif loss == "ipo":
        terms = ((x - 0.5) / beta).square()
    else:
        assert t.kl is not None
        far = beta * t.kl.detach()
        terms = (torch.sigmoid(far - chosen_reward) + torch.sigmoid(rejected_reward - far)) / 2
    return mean(terms), {
        "accuracy": mean((x.detach().sign() + 1) / 2),
        "margin": mean(x.detach()),
        "chosen_reward": mean(chosen_reward.detach()),
        "rejected_reward": mean(rejected_reward.detach()),
    }


def reward_loss(tensors: PairTensors, options: PairOptions, denominator: float | Tensor | None) -> tuple[Tensor, Stats]:
    """Bradley-Terry: logistic(chosen - rejected - margin) + center_coef * (chosen + rejected)^2."""
    t, e = tensors, options.label_smoothing
    mean = weighted_mean(t.weights, t.chosen.numel(), denominator)
    counts = None if t.weights is None else t.weights != 0
    chosen, rejected = keep(t.chosen, counts), keep(t.rejected, counts)  # (P,)
    difference = chosen - rejected
    wanted = 0.0 if t.margins is None else keep(t.margins.detach(), counts)
    terms = logistic(difference - wanted, 1 - e, e)
    if options.center_coef != 0:
        terms = terms + options.center_coef * (chosen + rejected).square()
    return mean(terms), {
        "accuracy": mean((difference.detach().sign() + 1) / 2),
        "margin": mean(difference.detach()),
    }
