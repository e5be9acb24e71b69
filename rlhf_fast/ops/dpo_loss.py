"""dpo_loss: direct preference optimisation on pairs of summed log-probabilities."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.ops import _checks, _dispatch, reference

BACKENDS = ("reference",)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO (Rafailov et al., arXiv:2305.18290, equation 7), with the label smoothing of conservative DPO.

    With h = (chosen - ref_chosen) - (rejected - ref_rejected) and e the label smoothing, the mean over pairs of

        -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).

    It is ln 2 when the policy is the reference, and then grows or falls with h alone.

    Args:
        chosen, rejected: (P,), float32, bfloat16, float16 or float64: log pi(response | prompt) of each pair, *summed*
            over response tokens (:func:`sequence_sum`). Gradients flow to these two.
        ref_chosen, ref_rejected: (P,), the same under the reference model: constants.
        beta: > 0.
        label_smoothing: in [0, 0.5]: the probability that a label is wrong.
        denominator: what to divide by instead of P: a number > 0 or a tensor of shape (), so that micro-batches add
            up to their batch. A tensor of 0 counts as 1.

    Returns:
        loss: a scalar, float32 (float64 if chosen or rejected is); 0 for no pair.
        stats: detached scalars, divided like the loss: accuracy (share of h > 0, ties count half), margin (beta h),
            chosen_reward (beta (chosen - ref_chosen)), rejected_reward.

    Raises:
        TypeError, ValueError: dtype, shape or device do not fit, or a number is out of range.
    """
    _checks.pairs(chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    _checks.number("beta", beta, above=0)
    _checks.number("label_smoothing", label_smoothing, least=0, most=0.5)
    _checks.denominators(denominator)
    _dispatch.choose("dpo_loss", BACKENDS, chosen)
    return reference.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing, denominator)
