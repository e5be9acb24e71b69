"""dpo_loss: direct preference optimisation on pairs of summed log-probabilities, and its relatives."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import PairTensors
from rlhf_fast.ops import _checks, dispatch, reference
from rlhf_fast.ops._pair_loss import BACKENDS, pair_loss
from rlhf_fast.ops.options import PairOptions


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO (Rafailov et al., arXiv:2305.18290, equation 7) and the losses that differ from it in one line.

    With rewards c = beta (chosen - ref_chosen), r = beta (rejected - ref_rejected), x = c - r and e the label
    smoothing, the mean over pairs of

        "sigmoid"   -(1 - e) log sigmoid(x) - e log sigmoid(-x); with e > 0 conservative DPO
        "robust"    the same over 1 - 2e, its second term added: unbiased if labels are wrong with probability e
                    (Chowdhury et al., arXiv:2403.00409)
        "hinge"     max(0, 1 - x)    (SLiC-HF, arXiv:2305.10425, as a loss of log-ratios)
        "ipo"       (x / beta - 1 / (2 beta))^2    (Azar et al., arXiv:2310.12036, equation 17; its log-probabilities
                    are means over tokens there where lengths differ: divide :func:`sequence_sum` by them)
        "kto"       (sigmoid(beta kl - c) + sigmoid(r - beta kl)) / 2    (Ethayarajh et al., arXiv:2402.01306, of pairs)

    "sigmoid" is ln 2 when the policy is the reference, and then grows or falls with x alone.

    Log-probabilities are those of :func:`token_logprobs`, which the caller shifts, summed over the tokens that the rows
    predict.

    Args:
        chosen, rejected: (P,), float32, bfloat16, float16 or float64: log pi(response | prompt) of each pair, *summed*
            over response tokens (:func:`sequence_sum`). Gradients flow to these two.
        ref_chosen, ref_rejected: (P,), the same under the reference model: constants.
        beta: > 0.
        label_smoothing: in [0, 0.5], for "robust" below 0.5; the probability that a label is wrong. 0 for the others.
        denominator: what to divide by instead of the sum of the weights: a number > 0 or a tensor of shape (), so that
            micro-batches add up to their batch. A tensor of 0 counts as 1.
        loss: which of the five.
        weights: (P,), >= 0, of each pair's loss and statistics, or None for 1: the annotators' confidence, say. A pair
            of weight 0 gets gradient exactly 0 and may hold anything.
        kl: for "kto", the KL to the reference in nats, what a reward is good or bad beside: a number or a tensor of
            shape (), a constant. The paper's: mean log-ratios of mismatched prompts and responses, at least 0.

    Returns:
        loss: a scalar, float32 (float64 if an input is); 0 for no pair.
        stats: detached scalars, divided like the loss: accuracy (share of x > 0, ties count half), margin (x),
            chosen_reward (c), rejected_reward (r).

    Raises:
        TypeError, ValueError: dtype, shape or device do not fit, a number is out of range, or a name is unknown.
    """
    _checks.pairs(chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected, weights=weights)
    options = PairOptions(loss=loss, beta=beta, label_smoothing=label_smoothing)
    if not isinstance(kl, Tensor):
        _checks.number("kl", kl, least=0)
    elif kl.shape != ():
        raise ValueError(f"kl: shape {tuple(kl.shape)}, expected a number or a tensor of shape ()")
    _checks.denominators(denominator)
    far = None
    if loss == "kto":
        far = kl if isinstance(kl, Tensor) else torch.as_tensor(kl, dtype=torch.float64, device=chosen.device)
    tensors = PairTensors(
        chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected, margins=None,
        weights=weights, kl=far,
    )  # fmt: skip
    widest = next((x for x in tensors.rewards if x is not None and x.dtype == torch.float64), chosen)
    backend = dispatch.choose("dpo_loss", BACKENDS, widest)
    if backend == "reference":
        return reference.dpo_loss(tensors, options, denominator)
    return pair_loss(tensors, options, denominator, backend)
