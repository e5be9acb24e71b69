"""reward_loss: Bradley-Terry loss of a reward model on pairs of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import PairTensors
from rlhf_fast.ops import _checks, dispatch, reference
from rlhf_fast.ops._pair_loss import BACKENDS, pair_loss
from rlhf_fast.ops.options import PairOptions


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
    denominator: float | Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bradley-Terry loss (Stiennon et al., arXiv:2009.01325), the mean over pairs of

        -(1 - e) log sigmoid(x) - e log sigmoid(-x) + center_coef * (chosen + rejected)^2,

    with x = chosen - rejected - margin and e the label smoothing. The margin: Llama 2, arXiv:2307.09288, equation 2;
    the centring: Eisenstein et al., arXiv:2312.09244.

    Args:
        chosen, rejected: (P,), float32, bfloat16, float16 or float64: the scores. Gradients flow to both.
        margin: (P,) tensor, a number, or None for 0: by how much chosen should win. A constant.
        center_coef: >= 0; pulls the scores of a pair towards a sum of 0.
        label_smoothing: in [0, 0.5]: the probability that a label is wrong.
        denominator: what to divide by instead of the sum of the weights: a number > 0 or a tensor of shape (), so that
            micro-batches add up to their batch. A tensor of 0 counts as 1.
        weights: (P,), >= 0, of each pair's loss and statistics, or None for 1: the annotators' confidence, say. A pair
            of weight 0 gets gradient exactly 0 and may hold anything.

    Returns:
        loss: a scalar, float32 (float64 if an input is); 0 for no pair.
        stats: detached scalars, divided like the loss: accuracy (share of chosen > rejected, ties count half) and
            margin (chosen - rejected).

    Raises:
        TypeError, ValueError: dtype, shape or device do not fit, or a number is out of range.
    """
    margins = margin if isinstance(margin, Tensor) else None
    _checks.pairs(chosen, rejected=rejected, margin=margins, weights=weights)
    if margin is not None and not isinstance(margin, Tensor):
        _checks.number("margin", margin)
    options = PairOptions(beta=1.0, label_smoothing=label_smoothing, center_coef=center_coef)
    _checks.denominators(denominator)
    given = [x for x in (chosen, rejected, margins) if x is not None]
    widest = next((x for x in given if x.dtype == torch.float64), chosen)
    if margins is None and margin:
        dtype = torch.float64 if widest.dtype == torch.float64 else torch.float32
        margins = torch.full(chosen.shape, float(margin), dtype=dtype, device=chosen.device)
    tensors = PairTensors(
        chosen=chosen, rejected=rejected, ref_chosen=None, ref_rejected=None, margins=margins, weights=weights, kl=None
    )  # fmt: skip
    backend = dispatch.choose("reward_loss", BACKENDS, widest)
    if backend == "reference":
        return reference.reward_loss(tensors, options, denominator)
    loss, stats = pair_loss(tensors, options, denominator, backend)
    return loss, {name: stats[name] for name in ("accuracy", "margin")}
